package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/network"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

type fakeDriver struct{ s *session }

func (d fakeDriver) Caps() vmm.Caps {
	return vmm.Caps{
		Name: "fake", Version: "1", Accel: "none", MaxVCPUs: 8, MemoryOverheadMB: 10,
		Snapshots: true, Machine: "toy", CPU: "abacus",
	}
}

// Restore starts a machine that goes on from what Save wrote.
func (d fakeDriver) Restore(ctx context.Context, spec vmm.Spec, from vmm.Saved) (vmm.VM, error) {
	if err := d.s.pass(ctx, "Restore"); err != nil {
		return nil, err
	}
	var vm *fakeVM
	err := d.s.do("Restore", func() error {
		memory := make([]byte, 64)
		if _, err := from.Memory.ReadAt(memory, 0); err != nil {
			return err
		}
		w := d.s.w
		w.mu.Lock()
		defer w.mu.Unlock()
		vm = w.launch(d.s, spec)
		vm.m.running, vm.m.held, vm.m.memory = false, true, string(bytes.TrimRight(memory, "\x00"))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// launch is called with w.mu held.
func (w *world) launch(s *session, spec vmm.Spec) *fakeVM {
	w.nextPID++
	w.launched++
	m := &machine{w: w, spec: spec, running: true, full: make(chan struct{}), done: make(chan struct{}), memory: fmt.Sprintf("boot %d of %s", w.launched, spec.ID)}
	m.ident = sandbox.Machine{Driver: "fake", UID: spec.UID, Process: sandbox.Process{PID: w.nextPID, StartTicks: 1, BootID: w.bootID}}
	w.vms[w.nextPID] = m
	return &fakeVM{s, m}
}

func (d fakeDriver) Launch(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	if err := d.s.pass(ctx, "Launch"); err != nil {
		return nil, err
	}
	var vm *fakeVM
	err := d.s.do("Launch", func() error {
		w := d.s.w
		w.mu.Lock()
		defer w.mu.Unlock()
		vm = w.launch(d.s, spec)
		return nil
	})
	if err != nil {
		return nil, err // after the effect: as a hutchd that died then
	}
	return vm, nil
}

func (d fakeDriver) Adopt(_ context.Context, ident sandbox.Machine, spec vmm.Spec) (vmm.VM, error) {
	var vm *fakeVM
	err := d.s.do("Adopt", func() error {
		d.s.w.mu.Lock()
		defer d.s.w.mu.Unlock()
		m := d.s.w.vms[ident.Process.PID]
		if m == nil || m.ident != ident || m.spec.Dir != spec.Dir {
			err := fault.New(fault.NotFound, "no process %d", ident.Process.PID)
			if e, known := d.s.w.exits[ident.Process.PID]; known {
				return &vmm.Gone{Exit: e, Err: err}
			}
			return err
		}
		vm = &fakeVM{d.s, m}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return vm, nil
}

type fakeVM struct {
	s *session
	m *machine
}

func (v *fakeVM) Machine() sandbox.Machine { return v.m.ident }
func (v *fakeVM) Done() <-chan struct{}    { return v.m.done }
func (v *fakeVM) Exit() vmm.Exit           { return v.m.exit }
func (v *fakeVM) DiskFull() <-chan struct{} {
	v.m.w.mu.Lock()
	defer v.m.w.mu.Unlock()
	return v.m.full
}

func (v *fakeVM) Close() error { return v.s.do("VM.Close", func() error { return nil }) }

func (v *fakeVM) DialLink(context.Context) (net.Conn, error) {
	return nil, errors.New("no link in this world")
}

func (v *fakeVM) set(ctx context.Context, name string, running bool) error {
	if err := v.s.pass(ctx, name); err != nil {
		return err
	}
	return v.s.do(name, func() error {
		v.m.w.mu.Lock()
		defer v.m.w.mu.Unlock()
		v.m.running = running
		if running {
			v.m.full = make(chan struct{})
		}
		return nil
	})
}

func (v *fakeVM) Pause(ctx context.Context) error  { return v.set(ctx, "VM.Pause", false) }
func (v *fakeVM) Resume(ctx context.Context) error { return v.set(ctx, "VM.Resume", true) }

// Save writes the machine's memory.
func (v *fakeVM) Save(ctx context.Context, to vmm.Files) (vmm.Stats, error) {
	if err := v.s.pass(ctx, "VM.Save"); err != nil {
		return vmm.Stats{}, err
	}
	err := v.s.do("VM.Save", func() error {
		v.m.w.mu.Lock()
		defer v.m.w.mu.Unlock()
		if v.m.running || !v.m.held {
			return fault.New(fault.Precondition, "running %v, held %v", v.m.running, v.m.held)
		}
		_, err := to.State.WriteString("devices")
		if err == nil {
			err = to.Memory.Truncate(int64(v.m.spec.MemoryMB) << 20)
		}
		if err == nil {
			_, err = to.Memory.WriteAt([]byte(v.m.memory), 0)
		}
		return err
	})
	return vmm.Stats{Version: "1", Machine: "toy", Accel: "none", CPU: "abacus"}, err
}

func (v *fakeVM) Running(context.Context) (running bool, err error) {
	err = v.s.do("VM.Running", func() error {
		v.m.w.mu.Lock()
		defer v.m.w.mu.Unlock()
		running = v.m.running
		return nil
	})
	return running, err
}

func (v *fakeVM) Kill(ctx context.Context) error {
	if err := v.s.pass(ctx, "VM.Kill"); err != nil {
		return err
	}
	return v.s.do("VM.Kill", func() error {
		v.m.w.end(v.m, vmm.Exit{Reason: vmm.Killed})
		return nil
	})
}

type fakeSlots struct{ s *session }

const worldSlots = 200

func slotOf(n int) network.Slot {
	return network.Slot{Index: n, HostIP: netip.AddrFrom4([4]byte{198, 19, byte(n >> 8), byte(n)}), Netns: fmt.Sprint("/netns/", n)}
}

func (f fakeSlots) Acquire(ctx context.Context, p sandbox.Policy) (slot network.Slot, err error) {
	if err := f.s.pass(ctx, "Acquire"); err != nil {
		return slot, err
	}
	err = f.s.do("Acquire", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		for n := 1; n <= worldSlots; n++ {
			if !f.s.w.slots[n] {
				f.s.w.slots[n] = true
				f.s.ours[n] = true
				f.s.w.policies[n] = p
				slot = slotOf(n)
				return nil
			}
		}
		return fault.New(fault.Exhausted, "no slot")
	})
	return slot, err
}

func (f fakeSlots) OpenTap(context.Context, network.Slot) (tap *os.File, err error) {
	err = f.s.do("OpenTap", func() error {
		tap, err = os.Open(os.DevNull)
		return err
	})
	return tap, err
}

// Release does nothing to slots that this hutchd does not know, as the real
// one.
func (f fakeSlots) Release(ctx context.Context, n int) error {
	if err := f.s.pass(ctx, "Release"); err != nil {
		return err
	}
	return f.s.do("Release", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		if f.s.ours[n] {
			delete(f.s.w.slots, n)
			delete(f.s.ours, n)
		}
		return nil
	})
}

func (f fakeSlots) Adopt(_ context.Context, n int, p sandbox.Policy) (network.Slot, error) {
	return slotOf(n), f.s.do("Slots.Adopt", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		if !f.s.w.slots[n] {
			return fault.New(fault.NotFound, "no slot %d", n)
		}
		f.s.ours[n] = true
		f.s.w.policies[n] = p
		return nil
	})
}

func (f fakeSlots) SetPolicy(_ context.Context, n int, p sandbox.Policy) error {
	return f.s.do("SetPolicy", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		if !f.s.ours[n] {
			return fault.New(fault.Precondition, "slot %d is not in use", n)
		}
		f.s.w.policies[n] = p
		return nil
	})
}

func (f fakeSlots) Reclaim(_ context.Context, live []int) error {
	return f.s.do("Reclaim", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		for n := range f.s.w.slots {
			if !slices.Contains(live, n) && !f.s.ours[n] {
				delete(f.s.w.slots, n)
			}
		}
		return nil
	})
}

func (f fakeSlots) Stats(context.Context, int) (network.Stats, error) { return network.Stats{}, nil }
func (f fakeSlots) Usage() (used, total int)                          { return len(f.s.ours), worldSlots }

type fakeRecords struct{ s *session }

func (f fakeRecords) Create(r sandbox.Record) error {
	return f.s.do("Records.Create", func() error { return f.s.store.Create(r) })
}

func (f fakeRecords) Put(r sandbox.Record) error {
	return f.s.do("Records.Put", func() error { return f.s.store.Put(r) })
}

func (f fakeRecords) Remove(id sandbox.ID) error {
	return f.s.do("Records.Remove", func() error { return f.s.store.Remove(id) })
}

func (f fakeRecords) Load() (store.Loaded, error)   { return f.s.store.Load() }
func (f fakeRecords) DataDisk(id sandbox.ID) string { return f.s.store.DataDisk(id) }
func (f fakeRecords) Hibernation(id sandbox.ID) string {
	return f.s.store.Hibernation(id)
}
func (f fakeRecords) Asleep(id sandbox.ID) bool { return f.s.store.Asleep(id) }
func (f fakeRecords) Woken(id sandbox.ID) bool  { return f.s.store.Woken(id) }
func (f fakeRecords) Spend(id sandbox.ID) error {
	return f.s.do("Spend", func() error { return f.s.store.Spend(id) })
}

func (f fakeRecords) DropMemory(id sandbox.ID) error {
	return f.s.do("DropMemory", func() error { return f.s.store.DropMemory(id) })
}

func (f fakeRecords) ConsoleLog(id sandbox.ID) string { return f.s.store.ConsoleLog(id) }
func (f fakeRecords) VMMLog(id sandbox.ID) string     { return f.s.store.VMMLog(id) }

type fakeEvents struct{ s *session }

func (f fakeEvents) Append(e sandbox.Event) sandbox.Event {
	err := f.s.do("Events.Append", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		e.Sequence = int64(len(f.s.w.events) + 1)
		f.s.w.events = append(f.s.w.events, e)
		return nil
	})
	if err != nil {
		e.Sequence = 0
	}
	return e
}

type fakeDisks struct{ s *session }

func (f fakeDisks) Create(ctx context.Context, path string, sizeMB int) error {
	if err := f.s.pass(ctx, "Disks.Create"); err != nil {
		return err
	}
	return f.s.do("Disks.Create", func() error { return os.WriteFile(path, []byte(fmt.Sprint(sizeMB)), 0o600) })
}

func (f fakeDisks) Clone(ctx context.Context, src, dst string) error {
	if err := f.s.pass(ctx, "Disks.Clone"); err != nil {
		return err
	}
	return f.s.do("Disks.Clone", func() error {
		b, err := os.ReadFile(src)
		if err != nil {
			return err
		}
		return os.WriteFile(dst, b, 0o600)
	})
}

func (f fakeDisks) Remove(path string) error {
	return f.s.do("Disks.Remove", func() error { return os.RemoveAll(path) })
}

func (f fakeDisks) Sync(string) error { return f.s.do("Disks.Sync", func() error { return nil }) }

func (f fakeDisks) Allocated(path string) (int64, error) {
	b, err := os.ReadFile(path)
	return int64(len(b)), err
}

type fakeTemplates struct{ s *session }

// fakeGuest is a connection to the guest of a machine.
type fakeGuest struct {
	s      *session
	m      *machine
	closed chan struct{}
	once   sync.Once

	mu     sync.Mutex
	config guestconn.Config // guarded by mu
	syncs  []time.Time      // guarded by mu
}

var _ guestconn.Guest = (*fakeGuest)(nil)

func newGuest(s *session, m *machine) *fakeGuest {
	return &fakeGuest{s: s, m: m, closed: make(chan struct{})}
}

func (g *fakeGuest) Ready(ctx context.Context) (guestconn.Hello, error) {
	if err := g.s.pass(ctx, "Ready"); err != nil {
		return guestconn.Hello{}, err
	}
	g.m.w.mu.Lock()
	silent := g.m.w.silent
	g.m.w.mu.Unlock()
	if silent {
		select {
		case <-ctx.Done():
			return guestconn.Hello{}, ctx.Err()
		case <-g.closed:
			return guestconn.Hello{}, net.ErrClosed
		}
	}
	return guestconn.Hello{AgentVersion: "1.2"}, g.s.do("Ready", func() error { return nil })
}

func (g *fakeGuest) Configure(ctx context.Context, c guestconn.Config) (guestconn.Facts, error) {
	if err := g.s.pass(ctx, "Configure"); err != nil {
		return guestconn.Facts{}, err
	}
	facts := guestconn.Facts{AgentVersion: "1.2", KernelVersion: "6.1", BootID: "guest-boot"}
	err := g.s.do("Configure", func() error {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.config = c
		g.m.w.mu.Lock()
		defer g.m.w.mu.Unlock()
		g.m.held = false
		for _, s := range c.Shares {
			if g.m.w.noMounts {
				facts.ShareErrors = append(facts.ShareErrors, s.Path+": no such device")
			}
		}
		return nil
	})
	return facts, err
}

func (g *fakeGuest) Quiesce(ctx context.Context) (guestconn.Quiesced, error) {
	if err := g.s.pass(ctx, "Quiesce"); err != nil {
		return guestconn.Quiesced{}, err
	}
	return guestconn.Quiesced{}, g.s.do("Quiesce", func() error {
		g.m.w.mu.Lock()
		defer g.m.w.mu.Unlock()
		if !g.m.running {
			return errors.New("a guest that stands does not answer")
		}
		g.m.held = true
		return nil
	})
}

func (g *fakeGuest) SyncClock(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.syncs = append(g.syncs, time.Now())
	return nil
}

func (g *fakeGuest) synced() []time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.syncs)
}

func (g *fakeGuest) Shutdown(_ context.Context, _ time.Duration) error {
	return g.s.do("Shutdown", func() error {
		g.m.w.mu.Lock()
		deaf := g.m.w.deaf || !g.m.running
		g.m.w.mu.Unlock()
		if !deaf {
			g.m.w.end(g.m, vmm.Exit{Reason: vmm.GuestPowerOff})
		}
		return nil
	})
}

// EnsureRuntime has Docker start, which takes a look at it.
func (g *fakeGuest) EnsureRuntime(ctx context.Context, start bool) (guestconn.Ensured, error) {
	if err := g.s.pass(ctx, "EnsureRuntime"); err != nil {
		return guestconn.Ensured{}, err
	}
	e := guestconn.Ensured{Status: guestconn.EnsureStarting}
	return e, g.s.do("EnsureRuntime", func() error {
		g.m.w.mu.Lock()
		defer g.m.w.mu.Unlock()
		if g.m.w.lacks != "" {
			e.Status, e.Message = guestconn.EnsureFailed, g.m.w.lacks
			return nil
		}
		g.m.starting = "docker"
		return nil
	})
}

func (g *fakeGuest) RuntimeStatus(ctx context.Context) (guestconn.RuntimeStatus, error) {
	up, services, err := g.look(ctx, "RuntimeStatus", "docker")
	return guestconn.RuntimeStatus{Containerd: true, Docker: up, Detail: "loading containers", Services: services}, err
}

func (g *fakeGuest) StartKubernetes(ctx context.Context) (guestconn.ClusterStatus, error) {
	if err := g.s.pass(ctx, "StartKubernetes"); err != nil {
		return guestconn.ClusterStatus{}, err
	}
	return guestconn.ClusterStatus{}, g.s.do("StartKubernetes", func() error {
		g.m.w.mu.Lock()
		defer g.m.w.mu.Unlock()
		g.m.starting = "kubernetes"
		return nil
	})
}

func (g *fakeGuest) KubernetesStatus(ctx context.Context) (guestconn.ClusterStatus, error) {
	up, services, err := g.look(ctx, "KubernetesStatus", "kubernetes")
	g.m.w.mu.Lock()
	defer g.m.w.mu.Unlock()
	return guestconn.ClusterStatus{Running: g.m.w.lacks == "", APIReady: true, NodeReady: up, Detail: g.m.w.lacks, Services: services}, err
}

// look is at something that was started. It is up after one.
func (g *fakeGuest) look(ctx context.Context, call, what string) (up bool, services []guestconn.Service, err error) {
	if err := g.s.pass(ctx, call); err != nil {
		return false, nil, err
	}
	err = g.s.do(call, func() error {
		g.m.w.mu.Lock()
		defer g.m.w.mu.Unlock()
		has := strings.HasSuffix(g.m.memory, "+"+what)
		switch {
		case g.m.w.crashes > 0:
			services = []guestconn.Service{{Name: what + "d", Status: "error", Detail: "no room", Crashes: g.m.w.crashes}}
		case has:
			up = true
		case g.m.starting == what:
			g.m.memory += "+" + what
		}
		return nil
	})
	return up, services, err
}

func (g *fakeGuest) Exec(context.Context, guestconn.Exec) (guestconn.Result, error) {
	return guestconn.Result{}, nil
}
func (g *fakeGuest) Memory(context.Context) (used, total uint64, err error) { return 1, 2, nil }
func (g *fakeGuest) Trim(context.Context) (guestconn.Trimmed, error) {
	return guestconn.Trimmed{Bytes: 7, Detail: "/: 7 bytes"}, nil
}
func (g *fakeGuest) Transport() http.RoundTripper { return nil }
func (g *fakeGuest) DialPort(context.Context, uint16) (net.Conn, error) {
	return nil, errors.New("no ports in this world")
}

func (g *fakeGuest) DialDocker(context.Context) (net.Conn, error) {
	return nil, g.s.do("DialDocker", func() error { return errors.New("the fake has no Docker") })
}

func (g *fakeGuest) DialUDP(context.Context, uint16) (net.Conn, error) {
	return nil, errors.New("the fake has no ports")
}

func (g *fakeGuest) WatchPorts(ctx context.Context, each func(guestconn.PortEvent) error) error {
	if err := each(guestconn.PortEvent{Kind: guestconn.PortsSynced}); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func (g *fakeGuest) Close() error {
	g.once.Do(func() { close(g.closed) })
	return nil
}
