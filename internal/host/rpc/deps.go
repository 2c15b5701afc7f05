package rpc

import (
	"context"
	"io"
	"net"
	"time"

	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// LogSource is one of the logs of a sandbox.
type LogSource string

// The logs.
const (
	ConsoleLog LogSource = "console" // the guest's serial console
	VMMLog     LogSource = "vmm"     // what the VMM process wrote
)

// Stats is what a sandbox uses now.
type Stats struct {
	CPU                                    time.Duration // of the VMM, since its start
	RSS, PSS                               int64         // of the VMM, bytes
	GuestUsed                              int64         // bytes; 0 when the guest can't be asked
	Disk                                   int64         // on the host, bytes
	RxBytes, TxBytes, RxPackets, TxPackets int64         // as the sandbox sees them
}

// HostInfo is what GetHostInfo tells, but for the number of sandboxes.
type HostInfo struct {
	Version, Kernel, Arch                       string
	VMM, VMMVersion, Accel, AccelReason         string
	KernelID                                    string
	CPUs                                        int
	MemoryBytes, MemoryAvailable, DiskAvailable int64
	SlotsUsed, SlotsTotal                       int
	Root                                        string
	StartedAt                                   time.Time
}

// Check is one thing that hutch needs of the host.
type Check struct {
	Name, Result, Detail, Advice string // Result: "ok", "warning", "problem"
}

// Host tells about the host.
type Host interface {
	Info(ctx context.Context) (HostInfo, error)
	Diagnose(ctx context.Context) ([]Check, error)
}

// TemplateDefaults override what an image says. Zero values leave it.
type TemplateDefaults struct {
	Env       map[string]string
	User, Cwd string

	VCPUs, MemoryMB, DiskMB int
}

// BuildTemplate asks for a template. Exactly one of Recipe, Reference and
// HostPath is set.
type BuildTemplate struct {
	Name                        string
	Recipe, Reference, HostPath string
	Platform                    string // empty: the host's
	Defaults                    TemplateDefaults
	InsecureRegistry            bool
	DockerConfig                []byte // empty: the daemon's own
}

// ImportTemplate asks for a template made from an archive.
type ImportTemplate struct {
	Name     string
	Platform string // empty: the host's
	Defaults TemplateDefaults
	// Archive is read by the call that it is given to, and not after.
	Archive io.Reader
}

// TemplateInfo is a template and what it takes on disk.
type TemplateInfo struct {
	template.Template
	DiskBytes int64
}

// Templates makes, shows and removes templates. Errors are faults: NotFound
// for an unknown template, Invalid for a source that can't be used.
type Templates interface {
	// Build and Import end early when ctx does, and leave nothing then.
	// progress may be called often and from any goroutine, and returns at once;
	// total is 0 when not known.
	Build(ctx context.Context, b BuildTemplate, progress func(step string, done, total int64)) (TemplateInfo, error)
	Import(ctx context.Context, i ImportTemplate) (TemplateInfo, error)
	List(ctx context.Context) ([]TemplateInfo, error)
	Inspect(ctx context.Context, name string) (TemplateInfo, error)
	Remove(ctx context.Context, name string) error
}

// Snapshots copies sandboxes, and keeps copies. It is *lifecycle.Manager.
type Snapshots interface {
	// WarmTemplate makes a template warm in the shape of a spec, with something
	// up in it.
	WarmTemplate(ctx context.Context, spec sandbox.Spec, ready snapshot.Ready) (*snapshot.Snapshot, error)
	// Fork makes count running copies of a sandbox, or none.
	Fork(ctx context.Context, id sandbox.ID, count int) (lifecycle.Forked, error)
	// CreateSnapshot writes a sandbox down under a name; stopped is how long it
	// stood still.
	CreateSnapshot(ctx context.Context, id sandbox.ID, name string) (s lifecycle.SnapshotView, stopped time.Duration, err error)
	// Snapshots returns all, oldest first.
	Snapshots() []lifecycle.SnapshotView
	VerifySnapshot(ctx context.Context, idOrName string) (lifecycle.SnapshotView, error)
	DeleteSnapshot(idOrName string, force bool) error
}

// Meter counts what callers asked for. metrics.Metrics is one.
type Meter interface {
	CreateEnded(err error, took time.Duration, stages []sandbox.Stage)
	ExecEnded(err error, took time.Duration)
}

// noMeter counts nothing.
type noMeter struct{}

func (noMeter) CreateEnded(error, time.Duration, []sandbox.Stage) {}
func (noMeter) ExecEnded(error, time.Duration)                    {}

// Docker is the Docker sockets of the sandboxes.
type Docker interface {
	// Path returns where the socket of a sandbox is, which is open then. It is
	// empty when the sandbox has none.
	Path(id sandbox.ID) string
	// Serve serves a connection as one to that socket, to its end.
	Serve(id sandbox.ID, conn net.Conn) error
}

// socketOf is d.Path, where there is a d. What makes a sandbox calls it before it
// answers, so that a client finds the socket at once.
func socketOf(d Docker, id sandbox.ID) string {
	if d == nil {
		return ""
	}
	return d.Path(id)
}
