package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

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
	if got := strings.Join(stages, " "); got != "record queue disk slot launch hello configure" {
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

// bring brings a new sandbox into a state, and returns how to let it go on
// when it is held there.
func bring(t *testing.T, h *host, id sandbox.ID, to sandbox.State) (release func()) {
	t.Helper()
	switch to {
	case sandbox.Pending:
		gate := h.s.gate("Ready")
		made := async(func() error { _, err := h.Create(h.c, id, plain); return err })
		holds(t, "pending", func() bool { return h.state(id) == sandbox.Pending })
		return func() {
			gate <- nil
			h.must(<-made)
		}
	case sandbox.Running:
		h.create(id, plain)
	case sandbox.Paused:
		h.create(id, plain)
		h.must(h.Pause(h.c, id))
	case sandbox.Stopped:
		h.create(id, plain)
		h.w.powerOff(t, id)
		h.reach(id, to)
	case sandbox.Failed:
		h.create(id, plain)
		h.w.crash(t, id)
		h.reach(id, to)
	case sandbox.Broken:
		h.create(id, plain)
		gate := h.s.gate("Release")
		gone := async(func() error { return h.Destroy(h.c, id) })
		gate <- errInjected
		if err := <-gone; !errors.Is(err, errInjected) {
			t.Errorf("destroy: %v", err)
		}
		return func() { close(gate) }
	case sandbox.Destroying:
		h.create(id, plain)
		gate := h.s.gate("VM.Kill")
		gone := async(func() error { return h.Destroy(h.c, id) })
		h.reach(id, to)
		return func() {
			gate <- nil
			h.must(<-gone)
		}
	case sandbox.Hibernated: // a later hutchd's work
		t.Fatal("use a record")
	}
	return func() {}
}

func request1(h *host, r sandbox.Request, id sandbox.ID) error {
	switch r {
	case sandbox.Use:
		_, done, err := h.Use(h.c, id)
		if err == nil {
			done()
		}
		return err
	case sandbox.Pause:
		return h.Pause(h.c, id)
	case sandbox.Resume:
		return h.Resume(h.c, id)
	case sandbox.Hibernate:
		return h.Hibernate(h.c, id)
	case sandbox.Destroy:
		return h.Destroy(h.c, id)
	}
	return errors.New("unknown request")
}

// TestEveryCell drives every cell of the state table through the Manager.
func TestEveryCell(t *testing.T) {
	accepted := map[sandbox.Request]sandbox.State{
		sandbox.Use: sandbox.Running, sandbox.Pause: sandbox.Paused, sandbox.Resume: sandbox.Running, sandbox.Destroy: sandbox.Gone,
	}
	for _, state := range sandbox.States() {
		for _, r := range sandbox.Requests() {
			t.Run(fmt.Sprintf("%s/%s", state, r), func(t *testing.T) {
				testenv.CheckGoroutines(t)
				w := newWorld(t)
				const id = "sb-1"
				release := func() {}
				var h *host
				if state == sandbox.Hibernated {
					h = startWith(t, w, id, state)
				} else {
					h = start(t, w)
					release = sync.OnceFunc(bring(t, h, id, state))
				}
				verdict, _ := sandbox.Decide(state, r)
				unimplemented := verdict == sandbox.Accept && (r == sandbox.Hibernate || r == sandbox.Resume && state == sandbox.Hibernated)
				switch {
				case unimplemented:
					wants(t, request1(h, r, id), fault.Unimplemented)
				case verdict == sandbox.Deny:
					err := request1(h, r, id)
					wants(t, err, fault.Precondition)
					if !strings.Contains(err.Error(), string(state)) || !strings.Contains(err.Error(), id) {
						t.Errorf("%q names not both the state and the sandbox", err)
					}
				case verdict == sandbox.Wait:
					result := async(func() error { return request1(h, r, id) })
					release()
					if err := <-result; r == sandbox.Hibernate {
						wants(t, err, fault.Unimplemented)
					} else if err != nil {
						t.Error(err)
					}
					if r == sandbox.Pause && h.state(id) != sandbox.Paused {
						t.Errorf("it is %s", h.state(id))
					}
				case verdict == sandbox.Already && state == sandbox.Destroying:
					result := async(func() error { return request1(h, r, id) })
					release()
					if err := <-result; err != nil && !fault.Is(err, fault.NotFound) { // it may come too late
						t.Error(err)
					}
				case verdict == sandbox.Already:
					h.must(request1(h, r, id))
					if h.state(id) != state {
						t.Errorf("it is %s now", h.state(id))
					}
				case verdict == sandbox.Accept:
					if state == sandbox.Broken {
						release()
					}
					h.must(request1(h, r, id))
					if got := h.state(id); got != accepted[r] {
						t.Errorf("it is %s now, want %s", got, accepted[r])
					}
					if state == sandbox.Pending { // the create was cut off
						release = func() {}
					}
				}
				release()
				if h.state(id) != sandbox.Gone {
					h.must(h.Destroy(h.c, id))
				}
				w.checkEmpty(t)
				h.stop(true)
			})
		}
	}
}

// startWith starts a hutchd that finds a sandbox in a state.
func startWith(t *testing.T, w *world, id sandbox.ID, state sandbox.State) *host {
	t.Helper()
	h := prepare(t, w)
	now := time.Now()
	h.must(h.s.store.Create(sandbox.Record{
		Version: 1, ID: id, State: state, Spec: plain.WithDefaults(), ImageDigest: "sha256:1",
		CreatedAt: now, ChangedAt: now, ActiveAt: now, Boots: 1,
	}))
	h.must(os.WriteFile(h.s.store.DataDisk(id), nil, 0o600))
	h.must(h.Start(h.c))
	if got := h.state(id); got != state {
		t.Fatalf("it is %s, want %s", got, state)
	}
	return h
}

var createStepNames = []string{"record", "queue", "disk", "slot", "launch", "hello", "configure", "running"}

func TestCreateUnwindsAtEveryStep(t *testing.T) {
	for _, name := range createStepNames {
		t.Run(name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{step: "create " + name}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			_, err := h.Create(h.c, "sb-1", plain)
			if !errors.Is(err, errInjected) || !br.hit {
				t.Fatalf("got %v", err)
			}
			w.checkEmpty(t)
			if len(h.List()) != 0 {
				t.Errorf("listed: %v", h.List())
			}
			story := w.story("sb-1")
			if name == "record" && len(story) != 0 || name != "record" && !cmp.Equal(story, []string{"pending/user", "gone/host"}) {
				t.Errorf("events %v", story)
			}
			h.create("sb-1", plain) // the same id works then
			h.must(h.Destroy(h.c, "sb-1"))
			w.checkEmpty(t)
			h.stop(true)
		})
	}
	// A step that is added joins by itself.
	o := &boot{}
	var names []string
	for _, s := range o.createSteps() {
		names = append(names, s.name)
	}
	if diff := cmp.Diff(createStepNames, names); diff != "" {
		t.Errorf("steps of create (-tested +there):\n%s", diff)
	}
}

func TestRebootUnwindsAtEveryStep(t *testing.T) {
	for _, s := range (&boot{}).rebootSteps() {
		t.Run(s.name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{step: "resume " + s.name}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			bring(t, h, "sb-1", sandbox.Stopped)
			if err := h.Resume(h.c, "sb-1"); !errors.Is(err, errInjected) || !br.hit {
				t.Fatalf("got %v", err)
			}
			want := sandbox.Failed
			if s.name == "record" {
				want = sandbox.Stopped
			}
			if h.state("sb-1") != want {
				t.Errorf("it is %s, want %s", h.state("sb-1"), want)
			}
			w.checkWhole(t, h.List())
			h.must(h.Resume(h.c, "sb-1"))
			w.checkWhole(t, h.List())
			h.must(h.Destroy(h.c, "sb-1"))
			w.checkEmpty(t)
			h.stop(true)
		})
	}
}

func TestDestroyTriesAgainAfterEveryStep(t *testing.T) {
	for _, name := range []string{"record", "guest connection", "VM", "network slot", "run directory", "files"} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{step: "destroy " + name}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			h.create("sb-1", plain)
			err := h.Destroy(h.c, "sb-1")
			if !br.hit {
				t.Fatal("the step was not reached")
			}
			if name == "record" { // it goes on without
				h.must(err)
				w.checkEmpty(t)
				return
			}
			if !errors.Is(err, errInjected) {
				t.Errorf("got %v", err)
			}
			v := h.reach("sb-1", sandbox.Broken)
			if !strings.Contains(v.Reason, errInjected.Error()) {
				t.Errorf("reason %q", v.Reason)
			}
			h.must(h.Destroy(h.c, "sb-1"))
			w.checkEmpty(t)
			if diff := cmp.Diff([]string{"pending/user", "running/user", "destroying/user", "broken/user", "destroying/user", "gone/user"}, w.story("sb-1")); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			h.stop(true)
		})
	}
}

// A broken sandbox outlives a restart, and can be destroyed after it.
func TestBrokenSurvivesRestart(t *testing.T) {
	w := newWorld(t)
	br := &breaker{step: "destroy VM"}
	h := start(t, w, func(p *Params) { p.Break = br.hook })
	h.create("sb-1", plain)
	if err := h.Destroy(h.c, "sb-1"); !errors.Is(err, errInjected) {
		t.Fatal(err)
	}
	h.stop(true)
	h = start(t, w)
	h.reach("sb-1", sandbox.Broken)
	h.must(h.Destroy(h.c, "sb-1"))
	w.checkEmpty(t)
}

func TestUndoThatFailsIsBroken(t *testing.T) {
	w := newWorld(t)
	br := &breaker{step: "create hello"}
	h := start(t, w, func(p *Params) { p.Break = br.hook })
	gate := h.s.gate("Release")
	made := async(func() error { _, err := h.Create(h.c, "sb-1", plain); return err })
	gate <- errors.New("slot is stuck")
	if err := <-made; !errors.Is(err, errInjected) || !strings.Contains(err.Error(), "slot is stuck") {
		t.Errorf("got %v", err)
	}
	v := h.reach("sb-1", sandbox.Broken)
	if v.Slot == 0 || v.Machine != nil {
		t.Errorf("the record holds slot %d and VM %v, want the slot alone", v.Slot, v.Machine)
	}
	_, err := h.Create(h.c, "sb-1", plain)
	wants(t, err, fault.Precondition)
	close(gate)
	h.must(h.Destroy(h.c, "sb-1"))
	w.checkEmpty(t)
}

func TestDestroyDuringEveryCreateStep(t *testing.T) {
	for _, name := range createStepNames {
		t.Run(name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{step: "create " + name, wait: true, at: make(chan struct{})}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			made := async(func() error { _, err := h.Create(h.c, "sb-1", plain); return err })
			<-br.at
			h.must(h.Destroy(h.c, "sb-1"))
			wants(t, <-made, fault.Precondition)
			w.checkEmpty(t)
			wants(t, h.Destroy(h.c, "sb-1"), fault.NotFound)
			if s := w.story("sb-1"); name != "record" && !cmp.Equal(s, []string{"pending/user", "gone/user"}) {
				t.Errorf("events %v", s)
			}
			h.create("sb-1", plain)
			h.stop(true)
		})
	}
}

// The host's own calls are cut off too: a guest that never answers, a VMM or
// a slot that takes its time.
func TestDestroyCutsOffCalls(t *testing.T) {
	for _, call := range []string{"Disks.Create", "Acquire", "Launch", "Ready", "Configure"} {
		t.Run(call, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			h := start(t, w)
			h.s.gate(call)
			made := async(func() error { _, err := h.Create(h.c, "sb-1", plain); return err })
			holds(t, "listed", func() bool { return h.state("sb-1") == sandbox.Pending })
			var wg sync.WaitGroup
			for range 5 { // all join, or come too late
				wg.Go(func() {
					if err := h.Destroy(h.c, "sb-1"); err != nil && !fault.Is(err, fault.NotFound) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			wants(t, <-made, fault.Precondition)
			w.checkEmpty(t)
			h.stop(true)
		})
	}
}

func TestConcurrentDestroysJoin(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	release := bring(t, h, "sb-1", sandbox.Destroying)
	var all []<-chan error
	for range 10 {
		all = append(all, async(func() error { return h.Destroy(h.c, "sb-1") }))
	}
	release()
	for _, c := range all {
		if err := <-c; err != nil && !fault.Is(err, fault.NotFound) {
			t.Error(err)
		}
	}
	w.checkEmpty(t)
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

func TestCrashInEveryState(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	for _, to := range []sandbox.State{sandbox.Running, sandbox.Paused} {
		id := sandbox.ID("sb-" + string(to))
		bring(t, h, id, to)
		w.crash(t, id)
		v := h.reach(id, sandbox.Failed)
		if v.Cause != sandbox.ByCrash || !strings.Contains(v.Reason, "last words") {
			t.Errorf("%s: %s, %q", to, v.Cause, v.Reason)
		}
		h.settled(id)
		w.checkWhole(t, h.List())
		h.must(h.Resume(h.c, id))
		h.must(h.Destroy(h.c, id))
	}

	// While it is being made: all is undone, and the reason told.
	h.s.gate("Ready")
	made := async(func() error { _, err := h.Create(h.c, "sb-new", plain); return err })
	holds(t, "launched", func() bool { v, err := h.Get("sb-new"); return err == nil && v.Machine != nil })
	w.crash(t, "sb-new")
	err := <-made
	wants(t, err, fault.Unavailable)
	if !strings.Contains(err.Error(), "last words") {
		t.Errorf("got %v", err)
	}
	w.checkEmpty(t)
	if s := w.story("sb-new"); !cmp.Equal(s, []string{"pending/user", "gone/crash"}) {
		t.Errorf("events %v", s)
	}
	h.stop(true)
}

func TestCrashWhileBooting(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	bring(t, h, "sb-1", sandbox.Stopped)
	h.s.gate("Ready")
	resumed := async(func() error { return h.Resume(h.c, "sb-1") })
	holds(t, "launched", func() bool {
		v, err := h.Get("sb-1")
		return err == nil && v.State == sandbox.Pending && v.Machine != nil
	})
	w.crash(t, "sb-1")
	wants(t, <-resumed, fault.Unavailable)
	if v := h.reach("sb-1", sandbox.Failed); v.Cause != sandbox.ByCrash {
		t.Errorf("cause %s", v.Cause)
	}
	w.checkWhole(t, h.List())
}

// A VMM that died and whose parts can't be freed is broken, not forgotten.
func TestCrashThatCannotBeFreed(t *testing.T) {
	w := newWorld(t)
	br := &breaker{step: "free"}
	h := start(t, w, func(p *Params) { p.Break = br.hook })
	h.create("sb-1", plain)
	w.crash(t, "sb-1")
	v := h.reach("sb-1", sandbox.Broken)
	if !strings.Contains(v.Reason, "last words") || !strings.Contains(v.Reason, errInjected.Error()) || v.Slot == 0 {
		t.Errorf("slot %d, reason %q", v.Slot, v.Reason)
	}
	h.must(h.Destroy(h.c, "sb-1"))
	w.checkEmpty(t)
}

func TestSilentGuestIsTold(t *testing.T) {
	w := newWorld(t)
	w.silent = true
	h := start(t, w, func(p *Params) { p.ReadyTimeout = 200 * time.Millisecond })
	gate := h.s.gate("Launch")
	made := async(func() error { _, err := h.Create(h.c, "sb-1", plain); return err })
	holds(t, "made a disk", func() bool { _, err := os.Stat(h.s.store.DataDisk("sb-1")); return err == nil })
	h.must(os.WriteFile(h.s.store.ConsoleLog("sb-1"), []byte("boot\r\n\r\n\x1b[1mKernel panic: no init\x07\n"), 0o600))
	close(gate)
	err := <-made
	wants(t, err, fault.Unavailable)
	for _, want := range []string{"did not answer in time", "boot | [1mKernel panic: no init"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not tell %q", err, want)
		}
	}
	w.checkEmpty(t)
}

func TestPauseThatFails(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	// It failed before it had an effect, then after.
	h.s.faults = func(_ int, name string) (error, error) {
		if name == "VM.Pause" {
			return errInjected, nil
		}
		return nil, nil
	}
	if err := h.Pause(h.c, "sb-1"); !errors.Is(err, errInjected) || h.state("sb-1") != sandbox.Running {
		t.Errorf("%v, %s", err, h.state("sb-1"))
	}
	h.s.faults = func(_ int, name string) (error, error) {
		if name == "VM.Pause" {
			return nil, errInjected
		}
		return nil, nil
	}
	if err := h.Pause(h.c, "sb-1"); !errors.Is(err, errInjected) || h.state("sb-1") != sandbox.Paused {
		t.Errorf("%v, %s", err, h.state("sb-1"))
	}
	h.must(h.Resume(h.c, "sb-1"))
}

// A disk that takes no record stops new sandboxes, but nothing that happens to
// those that are there.
func TestRecordsThatCannotBeWritten(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.create("sb-2", plain)
	full := fault.New(fault.Exhausted, "disk full")
	h.s.faults = func(_ int, name string) (error, error) {
		if name == "Records.Put" || name == "Records.Create" {
			return full, nil
		}
		return nil, nil
	}
	_, err := h.Create(h.c, "sb-3", plain)
	wants(t, err, fault.Exhausted)
	h.must(h.Pause(h.c, "sb-1"))
	h.must(h.Resume(h.c, "sb-1"))
	w.crash(t, "sb-1")
	h.reach("sb-1", sandbox.Failed)
	wants(t, h.Resume(h.c, "sb-1"), fault.Exhausted)
	h.must(h.Destroy(h.c, "sb-1"))
	h.must(h.Pause(h.c, "sb-2"))
	h.s.mu.Lock()
	h.s.faults = nil
	h.s.mu.Unlock()
	h.stop(true)
	h = start(t, w)
	if h.state("sb-2") != sandbox.Paused || len(h.List()) != 1 {
		t.Errorf("after a restart: %+v", h.List())
	}
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

func TestStaleRunDirectories(t *testing.T) {
	w := newWorld(t)
	stale := filepath.Join(w.run, "sandboxes", "sb-gone")
	if err := os.MkdirAll(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	start(t, w)
	w.checkEmpty(t)
}
