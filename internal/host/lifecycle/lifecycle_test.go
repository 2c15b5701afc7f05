package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestLife(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	spec := sandbox.Spec{
		DefaultEnv: map[string]string{"A": "caller", "B": "b"}, DefaultUser: "u",
		Network: sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"192.0.2.7"}},
	}
	v := h.create("", spec)
	if v.State != sandbox.Running || v.Pid == 0 || v.HostIP != "198.19.0.1" || v.Boots != 1 ||
		v.AgentVersion != "1.2" || v.KernelVersion != "6.1" || v.BootID != "guest-boot" || v.KernelID != "k1" {
		t.Errorf("view: %+v", v)
	}
	want := sandbox.Spec{
		Template: "minimal", VCPUs: 1, MemoryMB: 512, DiskMB: 5120, DefaultUser: "u", DefaultEnv: spec.DefaultEnv,
		Network: sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"192.0.2.7/32"}},
	}
	if diff := cmp.Diff(want, v.Spec); diff != "" {
		t.Errorf("spec (-want +got):\n%s", diff)
	}
	var stages []string
	for _, s := range v.Stages {
		stages = append(stages, s.Name)
	}
	if got := strings.Join(stages, " "); got != "record queue slot disk launch hello configure" {
		t.Errorf("stages: %s", got)
	}
	vm := w.vm(t, v.ID)
	if vm.spec.UID != 300001 || vm.spec.Netns != "/netns/1" || vm.spec.NIC == nil || len(vm.spec.Disks) != 3 {
		t.Errorf("machine: %+v", vm.spec)
	}
	g, done, err := h.Use(h.c, v.ID)
	h.must(err)
	if diff := cmp.Diff(guestconn.Config{
		ID: string(v.ID), MachineID: v.MachineID, Address: "198.18.0.2/30", Gateway: "198.18.0.1", DNS: []string{"192.0.2.53"}, MTU: 1500,
		Env: map[string]string{"PATH": "/bin", "A": "caller", "B": "b"}, DefaultUser: "u", DefaultCwd: "/srv",
	}, g.(*fakeGuest).config); diff != "" {
		t.Errorf("guest config (-want +got):\n%s", diff)
	}
	if got, _ := h.Get(string(v.ID)); got.InFlight != 1 {
		t.Errorf("in flight: %d, want 1", got.InFlight)
	}
	done()
	done() // is idempotent
	if got, _ := h.Get(string(v.ID)); got.InFlight != 0 {
		t.Errorf("in flight: %d, want 0", got.InFlight)
	}
	h.must(h.Pause(h.c, v.ID))
	if w.vm(t, v.ID).running {
		t.Error("the vCPUs still run")
	}
	h.must(h.Resume(h.c, v.ID))
	w.powerOff(t, v.ID)
	if v := h.reach(v.ID, sandbox.Stopped); v.Cause != sandbox.ByGuest {
		t.Errorf("cause %s", v.Cause)
	}
	h.must(h.Resume(h.c, v.ID))
	if v := h.reach(v.ID, sandbox.Running); v.Boots != 2 {
		t.Errorf("%d boots", v.Boots)
	}
	w.crash(t, v.ID)
	if v := h.reach(v.ID, sandbox.Failed); v.Reason != "crashed: signal 11 [31mlast words" {
		t.Errorf("reason %q", v.Reason)
	}
	h.must(h.Destroy(h.c, v.ID))
	w.checkEmpty(t)
	wants(t, h.Destroy(h.c, v.ID), fault.NotFound)
	if diff := cmp.Diff([]string{
		"pending/user", "running/user", "paused/user", "running/user", "stopped/guest", "pending/user", "running/user",
		"error/crash", "destroying/user", "gone/user",
	}, w.story(v.ID)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	previous := sandbox.State("")
	for i, e := range w.told() {
		if e.Previous != previous || e.Time.IsZero() {
			t.Errorf("event %d: %+v follows %q", i, e, previous)
		}
		previous = e.State
	}
	h.stop(true)
}

func TestCreateIsIdempotent(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if v, err := h.Create(h.c, "sb-1", plain); err != nil || v.State != sandbox.Running {
				t.Errorf("%s, %v", v.State, err)
			}
		})
	}
	wg.Wait()
	if w.launched != 1 {
		t.Errorf("%d VMs were launched", w.launched)
	}
	other := plain
	other.MemoryMB = 256
	_, err := h.Create(h.c, "sb-1", other)
	wants(t, err, fault.Exists)
	equal := plain
	equal.Template, equal.DefaultEnv, equal.Labels = "minimal", map[string]string{}, map[string]string{}
	equal.Network = sandbox.Policy{Mode: sandbox.ModeInternet, Allow: []string{}}
	h.create("sb-1", equal)

	// While one of that id is on its way out, a create waits and makes it anew.
	gate := h.s.gate("VM.Kill")
	gone := async(func() error { return h.Destroy(h.c, "sb-1") })
	h.reach("sb-1", sandbox.Destroying)
	made := async(func() error { _, err := h.Create(h.c, "sb-1", other); return err })
	close(gate)
	h.must(<-gone)
	h.must(<-made)
	if v := h.reach("sb-1", sandbox.Running); v.Spec.MemoryMB != 256 || w.launched != 2 {
		t.Errorf("memory %d after %d launches", v.Spec.MemoryMB, w.launched)
	}
	h.stop(true)
}

func TestClientGoneMidCreate(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	gate := h.s.gate("Ready")
	ctx, cancel := context.WithCancel(h.c)
	made := async(func() error { _, err := h.Create(ctx, "sb-1", plain); return err })
	holds(t, "pending", func() bool { return h.state("sb-1") == sandbox.Pending })
	cancel()
	if err := <-made; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(gate)
	h.reach("sb-1", sandbox.Running)
	h.must(request1(h, sandbox.Use, "sb-1"))
}

func TestGetAndWait(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	for _, id := range []sandbox.ID{"sb-1", "sb-10", "sb-11", "other"} {
		h.create(id, plain)
	}
	for in, want := range map[string]sandbox.ID{"sb-1": "sb-1", "sb-10": "sb-10", "o": "other", "other": "other"} {
		if v, err := h.Get(in); err != nil || v.ID != want {
			t.Errorf("get %q: %s, %v", in, v.ID, err)
		}
	}
	_, err := h.Get("sb")
	wants(t, err, fault.Invalid)
	if !strings.Contains(err.Error(), "sb-1, sb-10, sb-11") {
		t.Errorf("%q does not name the candidates", err)
	}
	for _, in := range []string{"", "x", "sb-12", "../other"} {
		_, err := h.Get(in)
		wants(t, err, fault.NotFound)
	}
	if v := h.List(); len(v) != 4 || v[0].ID != "sb-1" || v[3].ID != "other" {
		t.Errorf("list is not oldest first: %v", v)
	}
	_, err = h.Wait(h.c, "none", sandbox.Running)
	wants(t, err, fault.NotFound)
	other := h.lookup("other")
	waited := async(func() error { return other.waitGone(h.c) })
	again := async(func() error {
		v, err := h.Wait(h.c, "other")
		if v.State != sandbox.Gone && !fault.Is(err, fault.NotFound) { // it may come too late
			return fmt.Errorf("%s: %w", v.State, err)
		}
		return nil
	})
	h.must(h.Destroy(h.c, "other"))
	h.must(<-waited)
	h.must(<-again)
	ctx, cancel := context.WithCancel(h.c)
	cancel()
	if _, err := h.Wait(ctx, "sb-1"); !errors.Is(err, context.Canceled) {
		t.Errorf("wait on a dead context: %v", err)
	}
}

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	for name, c := range map[string]struct {
		id    sandbox.ID
		spec  sandbox.Spec
		class fault.Class
		field string
	}{
		"template": {"", sandbox.Spec{Template: "none"}, fault.NotFound, ""},
		"id":       {"../x", plain, fault.Invalid, "sandbox_id"},
		"vcpus":    {"", sandbox.Spec{VCPUs: 9}, fault.Invalid, "vcpus"},
		"negative": {"", sandbox.Spec{VCPUs: -1}, fault.Invalid, "vcpus"},
		"memory":   {"", sandbox.Spec{MemoryMB: 5}, fault.Invalid, "memory_mb"},
		"disk":     {"", sandbox.Spec{DiskMB: 1 << 30}, fault.Invalid, "disk_size_mb"},
		"timeout":  {"", sandbox.Spec{Timeout: -1}, fault.Invalid, "timeout_sec"},
		"user":     {"", sandbox.Spec{DefaultUser: "a b"}, fault.Invalid, "default_user"},
		"env name": {"", sandbox.Spec{DefaultEnv: map[string]string{"A=B": ""}}, fault.Invalid, "default_env"},
		"env zero": {"", sandbox.Spec{DefaultEnv: map[string]string{"A": "\x00"}}, fault.Invalid, "default_env"},
		"label":    {"", sandbox.Spec{Labels: map[string]string{"": "x"}}, fault.Invalid, "labels"},
		"mode":     {"", sandbox.Spec{Network: sandbox.Policy{Mode: "x"}}, fault.Invalid, "network.mode"},
		"allow":    {"", sandbox.Spec{Network: sandbox.Policy{Allow: []string{"10.0.0.1/8"}}}, fault.Invalid, "network.allow"},
		"ipv6":     {"", sandbox.Spec{Network: sandbox.Policy{Allow: []string{"::/0"}}}, fault.Invalid, "network.allow"},
	} {
		_, err := h.Create(h.c, c.id, c.spec)
		if !fault.Is(err, c.class) {
			t.Errorf("%s: %v, want %s", name, err, c.class)
		}
		var f *fault.Error
		if errors.As(err, &f) && f.Field != c.field {
			t.Errorf("%s: names field %q, want %q", name, f.Field, c.field)
		}
	}
	w.checkEmpty(t)
	if v := h.create("", sandbox.Spec{Template: "big"}); v.Spec.VCPUs != 2 || v.Spec.MemoryMB != 1024 {
		t.Errorf("the template's shape was not taken: %+v", v.Spec)
	}
}

func TestNotStarted(t *testing.T) {
	w := newWorld(t)
	h := prepare(t, w)
	_, err := h.Create(h.c, "sb-1", plain)
	wants(t, err, fault.Unavailable)
	h.must(h.Start(h.c))
	h.create("sb-1", plain)
	h.stop(true)
	for _, r := range sandbox.Requests() {
		wants(t, request1(h, r, "sb-1"), fault.Unavailable)
	}
	_, err = h.Create(h.c, "sb-2", plain)
	wants(t, err, fault.Unavailable)
	if err := h.Start(h.c); err == nil {
		t.Error("started twice")
	}
}

func TestNewRefusesHoles(t *testing.T) {
	if _, err := New(Params{}); err == nil {
		t.Error("no parameters and no error")
	}
}

// Many callers at once, each doing what it likes, must leave every sandbox
// whole.
func TestManyAtOnce(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Limits.MaxQueue = 1000 })
	const ids, workers, rounds = 4, 25, 40
	var wg sync.WaitGroup
	for n := range ids * workers {
		id := sandbox.ID(fmt.Sprintf("sb-%d", n%ids))
		wg.Go(func() {
			for i := range rounds {
				var err error
				switch (n + i*7) % 8 {
				case 0, 1:
					_, err = h.Create(h.c, id, plain)
				case 2:
					err = h.Pause(h.c, id)
				case 3, 4:
					err = h.Resume(h.c, id)
				case 5:
					err = request1(h, sandbox.Use, id)
				case 6:
					if i%5 == 0 {
						err = h.Destroy(h.c, id)
					}
				case 7:
					w.mu.Lock()
					var vm *machine
					for _, m := range w.vms {
						if m.spec.ID == id {
							vm = m
						}
					}
					w.mu.Unlock()
					if vm != nil && i%3 == 0 {
						w.end(vm, vmm.Exit{Reason: vmm.GuestPowerOff})
					}
				}
				switch fault.Of(err) {
				case fault.NotFound, fault.Precondition, fault.Unavailable:
				default:
					if err != nil {
						t.Errorf("%s: %v", id, err)
					}
				}
				h.List()
			}
		})
	}
	wg.Wait()
	for i := range ids {
		h.settled(sandbox.ID(fmt.Sprintf("sb-%d", i)))
	}
	w.checkWhole(t, h.List())
	for _, v := range h.List() {
		h.must(h.Destroy(h.c, v.ID))
	}
	w.checkEmpty(t)
	h.stop(true)
	if m := h.admission; m.memoryMB != 0 || m.bootingMB != 0 || m.booting != 0 || m.waiting.Len() != 0 {
		t.Errorf("admission still counts %d MiB, %d booting MiB, %d boots, %d waiting", m.memoryMB, m.bootingMB, m.booting, m.waiting.Len())
	}
}
