// Package fake is a vmm.Driver without a VMM: its machines are objects in
// memory, on a Host that outlives its drivers as a real host outlives hutchd.
//
// It owns the ways to make machines fail: at launch, save and restore, by
// ending, by hanging. It never runs a guest by itself: Params.OnLink attaches
// one, which may keep its data in Machine.RAM to have it saved. It passes
// vmmtest.
package fake

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// DriverName is Caps.Name and sandbox.Machine.Driver.
const DriverName = "fake"

// What Caps tells.
const (
	version = "1.0"
	accel   = "none"
)

// bootID stands for the host's.
const bootID = "fake-boot"

// Params makes a Host.
type Params struct {
	// OnLink gets the guest's side of a link when hutchd opens it. It runs in a
	// goroutine of its own and should end when the connection does; it may be
	// called again while an earlier call is ending. Nil: the guest is silent.
	OnLink func(m *Machine, guest net.Conn)
	// LogMax is the size of each capped log, in bytes; 0: proc.DefaultLogMax.
	LogMax int64
}

// Host holds machines. It is safe for concurrent use.
type Host struct {
	params Params
	guests sync.WaitGroup

	mu       sync.Mutex
	machines map[int]*Machine // live ones, by pid; guarded by mu
	ended    map[int]*Machine // the others; guarded by mu
	lastPID  int              // guarded by mu
	launch   func(context.Context, vmm.Spec) error
	restore  func(context.Context, vmm.Spec) error
	save     func(context.Context, *Machine) error
}

// NewHost returns an empty host.
func NewHost(p Params) *Host {
	return &Host{params: p, machines: map[int]*Machine{}, ended: map[int]*Machine{}, lastPID: 1 << 22} // above every real pid
}

// OnLaunch makes every later Launch call f first, which may fail or wait. Nil
// takes it back.
func (h *Host) OnLaunch(f func(context.Context, vmm.Spec) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.launch = f
}

// Machines returns the live machines, in the order of their ids.
func (h *Host) Machines() []*Machine {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []*Machine
	for _, m := range h.machines {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b *Machine) int { return strings.Compare(string(a.Spec.ID), string(b.Spec.ID)) })
	return all
}

// Machine returns the live machine of id, nil when there is none.
func (h *Host) Machine(id sandbox.ID) *Machine {
	for _, m := range h.Machines() {
		if m.Spec.ID == id {
			return m
		}
	}
	return nil
}

// Wait waits until every OnLink has returned.
func (h *Host) Wait() { h.guests.Wait() }

// Driver returns a driver on h, as a process that has just started has it.
func (h *Host) Driver() *Driver { return &Driver{host: h} }

// Driver is a vmm.Driver, and a vmm.Snapshotter.
type Driver struct{ host *Host }

var (
	_ vmm.Driver      = (*Driver)(nil)
	_ vmm.Snapshotter = (*Driver)(nil)
)

// Caps are made up.
func (d *Driver) Caps() vmm.Caps {
	return vmm.Caps{
		Name: DriverName, Version: version, Accel: accel, AccelReason: "nothing runs",
		MaxVCPUs: vmm.MaxVCPUs, MemoryOverheadMB: 1,
		Snapshots: true, Machine: machineType, CPU: cpu,
	}
}

// Launch makes a machine.
func (d *Driver) Launch(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	v, err := d.launch(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("launch %s: %w", spec.ID, err)
	}
	return v, nil
}

func (d *Driver) launch(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	d.host.mu.Lock()
	hook := d.host.launch
	d.host.mu.Unlock()
	if err := d.prepare(ctx, spec, hook); err != nil {
		return nil, err
	}
	ram, err := newRAM(int64(spec.MemoryMB) << 20)
	if err != nil {
		return nil, err
	}
	v, err := d.start(spec, ram, true)
	if err != nil {
		ram.close()
		return nil, err
	}
	return v, nil
}

// prepare is what comes before a machine: checks, and the test's own hook.
func (d *Driver) prepare(ctx context.Context, spec vmm.Spec, hook func(context.Context, vmm.Spec) error) error {
	if err := spec.Check(); err != nil {
		return err
	}
	if hook != nil {
		if err := hook(ctx, spec); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return checkFiles(spec)
}

// start makes a machine with a memory, which it takes over.
func (d *Driver) start(spec vmm.Spec, ram *RAM, running bool) (vmm.VM, error) {
	h := d.host
	console, err := proc.CreateCapped(spec.ConsoleLog, h.params.LogMax)
	if err != nil {
		return nil, err
	}
	spec.NIC = nil
	m := &Machine{
		Spec: spec, host: h, console: console, ram: ram, running: running,
		full: make(chan struct{}), done: make(chan struct{}), hung: make(chan struct{}), still: make(chan struct{}, 1),
	}
	close(m.hung)
	h.mu.Lock()
	for _, other := range h.machines {
		if other.Spec.ID == spec.ID {
			h.mu.Unlock()
			console.Close()
			return nil, fault.New(fault.Exists, "a machine of this id runs")
		}
	}
	h.lastPID++
	m.process = sandbox.Process{PID: h.lastPID, StartTicks: uint64(h.lastPID) * 7, BootID: bootID}
	h.machines[h.lastPID] = m
	h.mu.Unlock()
	fmt.Fprintf(m, "fake machine %s is ready\n", spec.ID)
	return newVM(m), nil
}

// Adopt takes up a live machine of the host.
func (d *Driver) Adopt(ctx context.Context, id sandbox.Machine, spec vmm.Spec) (vmm.VM, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("adopt %s: %w", spec.ID, err)
	}
	if err := spec.CheckAdopted(); err != nil {
		return nil, fmt.Errorf("adopt: %w", err)
	}
	d.host.mu.Lock()
	m, gone := d.host.machines[id.Process.PID], d.host.ended[id.Process.PID]
	d.host.mu.Unlock()
	if m != nil && id.Driver == DriverName && m.process == id.Process {
		return newVM(m), nil
	}
	err := fault.New(fault.NotFound, "adopt %s: process %d is gone", spec.ID, id.Process.PID)
	if gone != nil && gone.process == id.Process {
		return nil, &vmm.Gone{Exit: gone.exit, Err: err}
	}
	return nil, err
}

// checkFiles fails as a real VMM does when something is not there.
func checkFiles(s vmm.Spec) error {
	paths := []string{s.Kernel}
	if s.Initrd != "" {
		paths = append(paths, s.Initrd)
	}
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		if st.Size() == 0 {
			return fmt.Errorf("open %s: it is empty", p)
		}
	}
	for _, d := range s.Disks {
		st, err := os.Stat(d.Path)
		if err != nil {
			return fmt.Errorf("open disk: %w", err)
		}
		if !st.Mode().IsRegular() || st.Size() == 0 || st.Size()%512 != 0 {
			return fmt.Errorf("open disk %s: not a file of 512-byte sectors", d.Path)
		}
	}
	if st, err := os.Stat(s.Dir); err != nil || !st.IsDir() {
		return fmt.Errorf("open directory %s: %w", s.Dir, orNotDir(err))
	}
	if s.Netns != "" {
		if _, err := os.Stat(s.Netns); err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
	}
	return nil
}

func orNotDir(err error) error {
	if err == nil {
		return unix.ENOTDIR
	}
	return err
}
