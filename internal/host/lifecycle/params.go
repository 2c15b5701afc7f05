package lifecycle

import (
	"context"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/network"
	"github.com/hutch-run/hutch/internal/host/share"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Records keeps the records, and says where a sandbox's files are. It is
// *store.Store.
type Records interface {
	// Create makes the sandbox's directory with its first record.
	Create(r sandbox.Record) error
	// Put replaces the record. A failure leaves the old one.
	Put(r sandbox.Record) error
	// Remove takes the directory away for good, in one step.
	Remove(id sandbox.ID) error
	Load() (store.Loaded, error)
	DataDisk(id sandbox.ID) string
	ConsoleLog(id sandbox.ID) string
	VMMLog(id sandbox.ID) string
}

// Memories keeps the memory of hibernated sandboxes. It is *store.Store.
type Memories interface {
	// Hibernation is where the memory of a sandbox is, or is to be.
	Hibernation(id sandbox.ID) string
	// Asleep tells whether one is there that was never used, Woken whether
	// there is one that was.
	Asleep(id sandbox.ID) bool
	Woken(id sandbox.ID) bool
	// Spend marks it as used, for good. There may be none.
	Spend(id sandbox.ID) error
	// DropMemory removes it, whichever it is.
	DropMemory(id sandbox.ID) error
}

// Events numbers and keeps events. It is *events.Log.
type Events interface {
	Append(e sandbox.Event) sandbox.Event
}

// Disks makes data disks. It is *disk.Disks.
type Disks interface {
	// Create makes an empty formatted disk. On error nothing is left.
	Create(ctx context.Context, path string, sizeMB int) error
	// Clone makes dst a copy of src, which nobody may write to meanwhile. On
	// error nothing is left.
	Clone(ctx context.Context, src, dst string) error
	// Remove removes a disk; one that is not there is no error.
	Remove(path string) error
	// Sync makes a disk outlive a crash of the host.
	Sync(path string) error
	// Allocated returns how many bytes the host has given to a disk.
	Allocated(path string) (int64, error)
}

// Templates knows the templates and their images.
type Templates interface {
	// Hold returns a template and the path of its image, and keeps the image
	// from being collected until release, which may be called more than once.
	// An unknown name is fault.NotFound. Hold and release may wait for a
	// collection that asks ImagesInUse.
	Hold(name string) (t template.Template, path string, release func(), err error)
	// Image returns the path of the image with a digest, which a template may
	// have moved on from. An unknown digest is fault.NotFound.
	Image(digest string) (string, error)
}

// Capacity is what a host has left.
type Capacity struct {
	MemoryMB int // that new processes can have
	DiskMB   int // where the sandboxes' disks are
}

// Limits bounds what the sandboxes of a host take. A zero field is no bound,
// except where it says otherwise.
type Limits struct {
	// MaxSandboxes counts all, those without a VM too.
	MaxSandboxes int
	// MaxStarts is how many VMs boot at the same time. 0: 4.
	MaxStarts int
	// MaxQueue is how many more may wait for their turn, first come first
	// served; beyond that a start is refused. 0: 64.
	MaxQueue int
	// MaxMemoryMB bounds the sum, over all sandboxes that have a VM, of the
	// guest's memory and the VMM's own.
	MaxMemoryMB int
	// MinFreeMemoryMB is what must be left of the host's available memory,
	// when a new VM and those that are still booting have taken all of theirs.
	MinFreeMemoryMB int
	// MinFreeDiskMB is what must be free on the disk for a new sandbox.
	MinFreeDiskMB int
}

// Params is what a Manager needs. Fields without a word about their zero value
// must be set.
type Params struct {
	Driver    vmm.Driver
	Slots     network.Slots
	Records   Records
	Memories  Memories
	Events    Events
	Disks     Disks
	Templates Templates
	// Shares serves directories of the host. Nil: it shares none.
	Shares share.Host
	// Kernel returns the pack that new boots use.
	Kernel func() (kernel.Pack, error)
	// Snapshots keeps snapshots. Nil: there are none.
	Snapshots Snapshots
	Warm      Warm
	// OldKernel returns the pack with an id, which a sandbox once booted. Nil:
	// there is only the one of now.
	OldKernel func(id string) (kernel.Pack, error)
	// Connect connects to the agent of a VM's guest. It does not block.
	Connect func(vm vmm.VM, log *slog.Logger) guestconn.Guest
	// Capacity tells what the host has left. Nil: no admission by it.
	Capacity func() (Capacity, error)
	// ReclaimJails ends every process, and removes every cgroup and jail, of
	// sandboxes that live does not claim. Nil: there are none.
	ReclaimJails func(ctx context.Context, live func(id sandbox.ID) bool) error

	// RunDir is a directory for sockets, with room for a sub-directory
	// "sandboxes". It may be empty after a reboot of the host.
	RunDir string
	// UIDBase plus the index of its slot is the user a VMM runs as. 0: 300000.
	UIDBase int
	// Cmdline is added to the kernel command line of every guest.
	Cmdline string
	// DNS is the name servers for guests.
	DNS []string
	// BootID is the host's boot id. Empty: read from /proc.
	BootID string
	Limits Limits
	// ReadyTimeout is how long a guest may take from its launch to the hello
	// of its agent. 0: 120 s.
	ReadyTimeout time.Duration
	// StopGrace is how long guests get to power off when hutchd stops them.
	// 0: 25 s.
	StopGrace time.Duration
	Log       *slog.Logger

	// Break, when a test sets it, is called before each step with its name,
	// "create slot" for one; its error fails the step.
	Break func(ctx context.Context, id sandbox.ID, step string) error
}

func (p Params) withDefaults() Params {
	p.UIDBase = orElse(p.UIDBase, 300_000)
	p.Limits.MaxStarts = orElse(p.Limits.MaxStarts, 4)
	p.Limits.MaxQueue = orElse(p.Limits.MaxQueue, 64)
	p.ReadyTimeout = orElse(p.ReadyTimeout, 120*time.Second)
	p.StopGrace = orElse(p.StopGrace, 25*time.Second)
	return p
}

func orElse[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// Errors with a class that more than one place returns.

func notFound(id string) error { return fault.New(fault.NotFound, "sandbox %s does not exist", id) }

func stopping() error { return fault.New(fault.Unavailable, "hutchd is stopping") }

// denied is the answer to a request that the state forbids.
func denied(id sandbox.ID, why string) error {
	return fault.New(fault.Precondition, "%s: %s", id, why)
}

// cancelCause is why the work on a sandbox was given up: a destroy, or hutchd
// stopping. It has a class, for the caller whose work it was.
type cancelCause struct{ error }

func (c cancelCause) Unwrap() error { return c.error }

// errDiskFull is why a guest stands that its VMM stopped.
var errDiskFull = fault.New(fault.Exhausted, "the host's disk is full, its guest stands; free space on it")

// vmDied is the end of a VMM that nobody asked for.
type vmDied struct{ exit vmm.Exit }

func (v vmDied) Error() string { return exitReason(v.exit) }
