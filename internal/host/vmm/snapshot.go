package vmm

import (
	"context"
	"os"
	"time"
)

// Saver is a VM whose machine can be saved.
type Saver interface {
	// Save writes the machine, which must be paused, into two empty files. It
	// closes the link first: bytes that still arrive would change memory that
	// is being read. Until it returns, Resume and DialLink wait. The machine
	// stays paused, whatever comes out, and can be resumed and saved again.
	//
	// Disks are not saved. What the guest wrote is in their files when Save
	// returns, and stays as it is until the VM is resumed. A machine that runs
	// is a fault.Precondition. The files are neither synced nor closed.
	Save(ctx context.Context, to Files) (Stats, error)
}

// Snapshotter is a Driver that can take up what was saved.
type Snapshotter interface {
	// Restore makes a machine go on from where it was saved, as often as it is
	// asked to, and returns with the vCPUs standing: Resume starts them. The
	// guest finds the link closed, and nobody on it until DialLink.
	//
	// The machine of spec must be the one that was saved, in its vCPUs, memory,
	// disks (in their order) and network interface; Kernel, Initrd and Cmdline
	// are not used. What does not fit is a fault.Precondition. On error nothing
	// is left behind.
	Restore(ctx context.Context, spec Spec, from Saved) (VM, error)
}

// Files is where a machine is saved to. Regular files and memory files will do.
type Files struct {
	// State gets the devices and the processors, in the driver's own format. It
	// tells of itself whether it is whole.
	State *os.File
	// Memory gets the guest's memory, and its size. Pages of zeros are holes.
	Memory *os.File
}

// Saved is a machine to restore. The caller closes the files after Restore.
type Saved struct {
	// State is only read, and may serve any number of restores at once.
	State *os.File
	// Memory is a memory file (see memfd_create(2)) that may be sealed, of just
	// the size of the guest's memory.
	Memory *os.File
	// Shared: the file is this machine's own memory from now on; nobody else
	// may have it. Otherwise the machine gets a copy on write, and the file
	// must be sealed against writing, growing and shrinking, so that none of
	// its users can change it.
	Shared bool
}

// Stats tells what a Save did.
type Stats struct {
	StateBytes int64
	// MemoryBytes is what is not zero, in whole pages.
	MemoryBytes           int64
	StateTime, MemoryTime time.Duration

	// What the guest saw of its VMM, as in Caps: that of the process that was
	// saved, which started before the VMM was updated, may differ.
	Version, Machine, Accel, CPU string
}
