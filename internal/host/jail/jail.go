package jail

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/undo"
)

// oomScoreAdj makes the kernel end a jailed program before the host's own.
const oomScoreAdj = 300

// Params makes a Jail.
type Params struct {
	// Parent names the cgroup that holds all of this jail's cgroups. Two
	// hutchd on one host need two: Reclaim ends everything in it that its own
	// hutchd does not claim. Lower-case letters, digits and dashes.
	Parent string
	Logger *slog.Logger
}

// Jail starts confined programs. It is safe for concurrent use.
type Jail struct {
	groups groups
	logger *slog.Logger
}

// New returns a Jail. It looks which cgroup hierarchies the host has, and
// needs root.
func New(p Params) (*Jail, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("confine programs: root is needed")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("look for cgroups: %w", err)
	}
	return newJail(p, findHierarchies(string(mounts)))
}

func newJail(p Params, h hierarchies) (*Jail, error) {
	if !validName(p.Parent) {
		return nil, fmt.Errorf("%q is no name for a cgroup", p.Parent)
	}
	if p.Logger == nil {
		p.Logger = slog.New(slog.DiscardHandler)
	}
	g, err := openGroups(h, p.Parent)
	if err != nil {
		return nil, err
	}
	return &Jail{groups: g, logger: p.Logger}, nil
}

// Cgroups tells which cgroup version limits the programs of this jail ("v1",
// "v2" or empty), and what of the limits this host does not have.
func (j *Jail) Cgroups() (version string, missing []string) {
	return j.groups.version, slices.Clone(j.groups.missing)
}

func validName(s string) bool {
	return regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?(_[a-z0-9]{1,16})?$`).MatchString(s)
}

// Cell is what one program is confined to.
type Cell struct {
	// Name names the cgroup, which no other live cell of this jail may have:
	// lower-case letters, digits and dashes, and after an underscore, which no id
	// of a sandbox has, what it is besides one's machine.
	Name string
	// UID is the user and group id to run as; there are no other groups.
	UID int
	// Netns is the path of a network namespace; empty: a new one without
	// interfaces.
	Netns string
	// Hide lists directories that the program sees empty and read-only. One
	// that does not exist is skipped.
	Hide []string
	// View, when there is one, is all that the program sees of the host's files;
	// Hide and Devices are for those that see all others.
	View *View
	// Owners, when there are any, make the program root among them, in a
	// namespace of processes too: with it ends whatever it started.
	Owners *Owners
	// Devices lists device nodes that the program may open although the host
	// keeps them to others: it gets nodes of its own in their places.
	Devices []string
	// MemoryMB limits memory, page cache included; 0: no limit.
	MemoryMB int
	// PIDs limits processes and threads; 0: no limit.
	PIDs int
	// CPUs is the program's share of the processors against other cells; 0: 1.
	CPUs int
	// OpenFiles limits open files; 0: as its parent.
	OpenFiles int
	// Program is what to start. Credential, Spawn and Cgroup are set here; an
	// empty Env means just a PATH.
	Program proc.Params
}

// Report tells what of a confinement the host did not allow. Everything that
// is not told in Missing holds.
type Report struct {
	// Cgroup is "v1", "v2" or empty.
	Cgroup  string
	Missing []string
}

func (r *Report) miss(what string, err error) {
	r.Missing = append(r.Missing, fmt.Sprintf("%s: %v", what, err))
}

// Start starts a program in its cell. Best effort are cgroups, resource limits
// and the OOM score, see Report; everything else fails the start. On error
// nothing is left. The caller calls Remove when the program is gone.
func (j *Jail) Start(ctx context.Context, c Cell) (*proc.Process, Report, error) {
	var report Report
	if !validName(c.Name) {
		return nil, report, fmt.Errorf("start %s: %q is no name for a cgroup", c.Program.Path, c.Name)
	}
	if c.UID <= 0 {
		return nil, report, fmt.Errorf("start %s: user id %d is not an unprivileged one", c.Program.Path, c.UID)
	}
	if err := j.groups.checkEmpty(c.Name); err != nil {
		return nil, report, fmt.Errorf("start %s: %w", c.Program.Path, err)
	}
	var undos undo.Stack
	enter, err := j.groups.create(c, &report)
	undos.Add("cgroup", func(ctx context.Context) error { return j.Remove(ctx, c.Name) })
	if err != nil {
		return nil, report, errors.Join(err, undos.Run(ctx))
	}
	p, err := j.start(ctx, c, enter, &report)
	if err != nil {
		return nil, report, errors.Join(err, undos.Run(ctx))
	}
	undos.Release()
	return p, report, nil
}

func (j *Jail) start(ctx context.Context, c Cell, enter entry, report *Report) (*proc.Process, error) {
	if enter.dir != nil {
		defer enter.dir.Close()
	}
	var netns *os.File
	if c.Netns != "" {
		f, err := os.Open(c.Netns)
		if err != nil {
			return nil, fmt.Errorf("start %s: open network namespace: %w", c.Program.Path, err)
		}
		defer f.Close()
		netns = f
	}
	program := c.Program
	if len(program.Env) == 0 {
		program.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	program.Credential = &syscall.Credential{Uid: uint32(c.UID), Gid: uint32(c.UID)}
	if o := c.Owners; o != nil {
		program.Credential = &syscall.Credential{}
		program.UIDs, program.GIDs = o.ids(c.UID), o.ids(o.GID)
	}
	program.Cgroup = enter.dir
	program.Spawn = func(fork func() (int, error)) error {
		return onOwnThread(func() error {
			for _, dir := range enter.threads {
				if err := set(dir, "tasks", strconv.Itoa(unix.Gettid())); err != nil {
					report.miss("enter cgroup", err)
				}
			}
			if err := confineThread(netns, c); err != nil {
				return err
			}
			pid, err := fork()
			if err != nil {
				return err
			}
			limit(pid, c, report)
			return nil
		})
	}
	p, err := proc.Start(ctx, program)
	if err == nil {
		offerToOOM(p.ID().PID, report)
	}
	return p, err
}

// offerToOOM makes the kernel choose the process early when memory is short.
func offerToOOM(pid int, report *Report) {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(oomScoreAdj)), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		report.miss("oom score", err)
	}
}

// limit sets what can only be set on a running process. It runs on the thread
// that forked, which ends after it: to limit a process of another user takes
// CAP_SYS_RESOURCE, so the thread becomes that user first. It has that one over
// a user namespace that it made.
func limit(pid int, c Cell, report *Report) {
	if c.Owners == nil {
		if err := becomeThread(c.UID); err != nil {
			report.miss("resource limits", err)
			return
		}
	}
	set := func(name string, resource int, value uint64) {
		err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: value, Max: value}, nil)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			report.miss("resource limit "+name, err)
		}
	}
	set("core", unix.RLIMIT_CORE, 0)
	if c.OpenFiles > 0 {
		set("open files", unix.RLIMIT_NOFILE, uint64(c.OpenFiles))
	}
	if c.PIDs > 0 && report.Cgroup == "" {
		// It counts by user id, so the cgroup's limit is the better one.
		set("processes", unix.RLIMIT_NPROC, uint64(c.PIDs))
	}
}
