// Package vmm says what hutch needs of a program that runs a microVM.
//
// It owns the interfaces Driver and VM, the optional ones of a driver that can
// save and restore machines, the description of a machine and the facts about a
// driver as data. It never knows a concrete VMM: those are its
// sub-packages, and each passes the suite in vmmtest, the fake included.
package vmm

import (
	"context"
	"net"
	"os"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// Driver starts microVMs of one kind. It keeps no state of its VMs: what has
// to outlive the process is in sandbox.Machine.
type Driver interface {
	// Caps tells what the driver can do on this host. The answer does not
	// change while the process lives.
	Caps() Caps
	// Launch starts a VM and returns when its vCPUs run. On error nothing is
	// left behind. The VM lives on when ctx ends, and when this process does.
	Launch(ctx context.Context, spec Spec) (VM, error)
	// Adopt takes up a VM that an earlier process launched. It is a
	// fault.NotFound when that very process is gone; then there is a *Gone in
	// the error if the driver can tell how it ended, however often it is asked.
	Adopt(ctx context.Context, m sandbox.Machine, spec Spec) (VM, error)
}

// VM is one live machine. All methods are safe for concurrent use.
type VM interface {
	// Machine is what a later Adopt needs.
	Machine() sandbox.Machine
	// Pause stops the vCPUs and returns when they stand. Pausing a paused VM
	// is no error.
	Pause(ctx context.Context) error
	// Resume starts the vCPUs again. Resuming a running VM is no error.
	Resume(ctx context.Context) error
	// Running reports whether the vCPUs run, as the VMM tells it now.
	Running(ctx context.Context) (bool, error)
	// DiskFull returns a channel that is closed when the VMM has begun to stop the
	// vCPUs by itself, because the host's disk has no room for what the guest
	// writes. None of it is lost: Resume has it tried again, and the channel is
	// another one then. Nil: the driver never does that.
	DiskFull() <-chan struct{}
	// Kill ends the VMM at once and returns when the process is reaped. It is
	// idempotent.
	Kill(ctx context.Context) error
	// Done is closed when the VMM is gone and its last words are read.
	Done() <-chan struct{}
	// Exit tells how the VMM ended. It may be called after Done is closed.
	Exit() Exit
	// DialLink opens the byte channel to the guest agent. Only one connection
	// is open at a time: a new one replaces the one before. A guest whose kernel
	// does not run has room to note some 16 connections that come and go; of
	// more than that it may miss the last one, until another comes.
	DialLink(ctx context.Context) (net.Conn, error)
	// Close lets go of the VM without ending it, so that another process may
	// adopt it: it closes sockets and stops goroutines. After Kill it frees
	// what is left. It is idempotent.
	Close() error
}

// Reason is why a VMM ended.
type Reason string

// The reasons.
const (
	GuestPowerOff Reason = "guest powered off"
	GuestPanic    Reason = "guest kernel panicked"
	GuestReset    Reason = "guest asked for a reboot"
	Killed        Reason = "killed"  // by Kill
	Crashed       Reason = "crashed" // anything else
)

// Exit is how a VMM ended.
type Exit struct {
	Reason Reason
	// Detail is the exit status and the last words of the VMM or of the
	// guest's console, for people.
	Detail string
}

// Gone is the error of an Adopt that came too late, and tells how the VMM ended
// while nobody watched. Reason is Crashed unless there is proof of another.
type Gone struct {
	Exit Exit
	Err  error // a fault.NotFound
}

// Error tells what is gone.
func (g *Gone) Error() string { return g.Err.Error() }

// Unwrap gives the class.
func (g *Gone) Unwrap() error { return g.Err }

// Caps is what a driver can do, as data.
type Caps struct {
	Name        string // "qemu"
	Version     string // of the VMM program
	Accel       string // "kvm", "tcg", "none"
	AccelReason string // why this accelerator, for people
	MaxVCPUs    int
	// MemoryOverheadMB is what a VM costs beyond its guest's memory, about.
	MemoryOverheadMB int

	// Snapshots: the driver is a Snapshotter and its VMs are Savers. What a
	// guest sees of Version, Machine, Accel and CPU it relies on for ever: a
	// snapshot fits only where they are as they were.
	Snapshots bool
	Machine   string // kind of machine, with its version: "pc-q35-7.2"
	CPU       string // model and features that guests get on this host
}

// Disk is one virtio-blk disk. The guest finds it by its serial, never by its
// place.
type Disk struct {
	Serial   string // at most 20 bytes
	Path     string
	ReadOnly bool
	// Discard gives blocks that the guest discards back to the host file.
	Discard bool
}

// NIC is the one network interface.
type NIC struct {
	// Tap is an open tap with a virtio-net header, attached to its interface.
	// The driver duplicates it; the caller closes its own after Launch.
	Tap *os.File
	MAC string
}

// Share is a directory of the host, served by a process that is not the VMM's.
type Share struct {
	Tag string // by which the guest finds it
	// Conn is the VMM's connection to that process, of the vhost-user protocol.
	// The driver duplicates it; the caller closes its own after Launch. Adopt
	// needs none.
	Conn *os.File
}

// Spec describes a machine to launch. Every path is absolute.
type Spec struct {
	ID       sandbox.ID
	VCPUs    int
	MemoryMB int
	Kernel   string
	Initrd   string
	Cmdline  string // what the driver needs itself (console) it adds
	Disks    []Disk
	NIC      *NIC // nil: no network
	// Shares are of a machine that boots: none that has one can be saved.
	Shares []Share
	// Netns is the path of the network namespace to run in. Empty: a new one
	// without interfaces.
	Netns string
	// Dir is an existing directory for sockets. The driver makes files in it
	// and removes them when the VM is gone.
	Dir string
	// ConsoleLog and VMMLog are where the guest's console and the VMM's own
	// words go, capped. A driver may keep files of its own beside VMMLog, with
	// its name and something more; they stay as the logs do.
	ConsoleLog string
	VMMLog     string
	// UID is the user and group id that the VMM runs as.
	UID int
}
