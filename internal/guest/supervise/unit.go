package supervise

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Unit is a service, as data. The functions may be nil; they run one at a time
// for each unit, and must end soon after their context does.
type Unit struct {
	// Name is also that of its cgroup and of its log: lower-case letters, digits
	// and dashes.
	Name string
	// Argv is the program, looked for in Path unless it has a slash, and its
	// arguments.
	Argv []string
	// Path is where its program is looked for, and its PATH unless Env has one.
	// Default: the constant of this name.
	Path string
	// Env is the whole environment, "KEY=VALUE"; PATH and HOME are added where
	// it has none.
	Env []string
	// Cwd is the working directory. Default: "/".
	Cwd string
	// Needs names units that must be ready before each start of this one. They
	// are started with it, and stopped after it.
	Needs []string
	// MemoryMin is the memory that the kernel leaves to it when it runs short,
	// in bytes.
	MemoryMin int64
	// OOMScoreAdj moves it in the order in which the kernel kills, from -1000
	// (never) to 1000.
	OOMScoreAdj int
	// Prepare runs before each start. Its error counts as a failed start.
	Prepare func(ctx context.Context) error
	// Ready asks the service itself whether it serves, and is called until it
	// does. Detail and error are for people, a line each. Nil: ready as soon as
	// it runs.
	Ready func(ctx context.Context) (detail string, err error)
	// BeforeStop runs before the signal of a stop, inside its time.
	BeforeStop func(ctx context.Context) error
	// StopSignal asks it to end. Default: SIGTERM.
	StopSignal unix.Signal
	// StopTimeout is what it gets to end before it is killed, where nobody says
	// otherwise, and its weight when a shutdown divides its time. Default: 10 s.
	StopTimeout time.Duration
	// KillRest kills what it leaves in its cgroup when it is stopped. What a
	// crash leaves is never killed: it may be somebody's container.
	KillRest bool
	// CleanUp runs when its program has ended, however that was.
	CleanUp func(ctx context.Context) error
}

// Path is where programs of services are looked for.
const Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

const defaultStopTimeout = 10 * time.Second

// maxName bounds a unit's name, in bytes.
const maxName = 32

// goodName reports whether a name can be that of a file and of a cgroup.
func goodName(name string) bool {
	return name != "" && len(name) <= maxName && strings.TrimLeft(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == "" && name[0] != '-'
}

// check completes and checks a definition.
func (u *Unit) check() error {
	if !goodName(u.Name) {
		return fmt.Errorf("define unit %q: the name must be lower-case letters, digits and dashes", u.Name)
	}
	if len(u.Argv) == 0 || u.Argv[0] == "" {
		return fmt.Errorf("define unit %s: it has no command", u.Name)
	}
	if slices.Contains(u.Needs, u.Name) {
		return fmt.Errorf("define unit %s: it needs itself", u.Name)
	}
	if u.MemoryMin < 0 || u.OOMScoreAdj < -1000 || u.OOMScoreAdj > 1000 {
		return fmt.Errorf("define unit %s: memory %d or OOM score %d is out of range", u.Name, u.MemoryMin, u.OOMScoreAdj)
	}
	if u.StopSignal == 0 {
		u.StopSignal = unix.SIGTERM
	}
	if u.StopTimeout == 0 {
		u.StopTimeout = defaultStopTimeout
	}
	if u.Path == "" {
		u.Path = Path
	}
	if u.Cwd == "" {
		u.Cwd = "/"
	}
	return nil
}

// errNoUnit is the cause of calls for units that nobody defined.
var errNoUnit = errors.New("no such unit")
