package lifecycle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// TestKilledAtEveryCall kills hutchd at every call it makes to the host in a
// sandbox's whole life, before the call's effect and after it. The next one
// must find the sandbox whole, in an old or a new state, and nothing that is
// nobody's; then everything must work on.
func TestKilledAtEveryCall(t *testing.T) {
	killEverywhere(t, func(h *host) {
		const id = "sb-1"
		_, err := h.Create(h.c, id, plain)
		for _, f := range []func() error{
			func() error { return h.Pause(h.c, id) },
			func() error { return h.Resume(h.c, id) },
			func() error { return h.Hibernate(h.c, id) },
			func() error { return h.Resume(h.c, id) },
			func() error {
				h.w.mu.Lock()
				defer h.w.mu.Unlock()
				for _, vm := range h.w.vms {
					go h.w.powerOff(h.t, vm.spec.ID)
				}
				return nil
			},
			func() error {
				_, err := h.Wait(h.c, id, sandbox.Stopped, sandbox.Failed, sandbox.Broken)
				return err
			},
			func() error { return h.Resume(h.c, id) },
			func() error { return h.Destroy(h.c, id) },
		} {
			h.s.mu.Lock()
			dead := h.s.dead
			h.s.mu.Unlock()
			if err != nil || dead {
				return
			}
			err = f()
		}
	})
}

// TestWarmKilledAtEveryCall makes a template warm and a sandbox from it.
func TestWarmKilledAtEveryCall(t *testing.T) {
	killEverywhere(t, func(h *host) {
		const id = "sb-1"
		if _, err := h.WarmTemplate(h.c, plain, ""); err != nil {
			return
		}
		if _, err := h.Create(h.c, id, plain); err == nil {
			_ = h.Destroy(h.c, id)
		}
	})
}

// TestSnapshotKilledAtEveryCall writes a sandbox down, and makes another of it.
func TestSnapshotKilledAtEveryCall(t *testing.T) {
	killEverywhere(t, func(h *host) {
		const id = "sb-1"
		_, err := h.Create(h.c, id, plain)
		for _, f := range []func() error{
			func() error { _, _, err := h.CreateSnapshot(h.c, id, "snap"); return err },
			func() error { return h.Destroy(h.c, id) },
			func() error { _, err := h.Create(h.c, id, sandbox.Spec{Template: "snap"}); return err },
			func() error { return h.Destroy(h.c, id) },
			func() error { return h.DeleteSnapshot("snap", false) },
		} {
			if err != nil {
				return
			}
			err = f()
		}
	})
}

// TestForkKilledAtEveryCall forks a sandbox and its copy.
func TestForkKilledAtEveryCall(t *testing.T) {
	killEverywhere(t, func(h *host) {
		id := sandbox.ID("sb-1")
		if _, err := h.Create(h.c, id, plain); err != nil {
			return
		}
		for range 2 {
			f, err := h.Fork(h.c, id, 1)
			if err != nil {
				return
			}
			id = f.Views[0].ID
		}
		for _, v := range h.List() {
			_ = h.Destroy(h.c, v.ID)
		}
	})
}

// TestSpareKilledAtEveryCall has a spare made, and takes it.
func TestSpareKilledAtEveryCall(t *testing.T) {
	killEverywhere(t, func(h *host) {
		h.p.Warm.Spares = 1
		if _, err := h.WarmTemplate(h.c, plain, ""); err != nil {
			return
		}
		for range 2 {
			if _, err := h.Create(h.c, "", plain); err != nil || !h.spareIsReady() {
				return
			}
		}
		for _, v := range h.List() {
			_ = h.Destroy(h.c, v.ID)
		}
		h.spares.drop()
	})
}

// spareIsReady waits for the spare that is being made. It says whether there is
// one then.
func (h *host) spareIsReady() bool {
	h.t.Helper()
	there := false
	holds(h.t, "no spare is being made any more", func() bool {
		h.spares.mu.Lock()
		defer h.spares.mu.Unlock()
		there = len(h.spares.ready) > 0
		return len(h.spares.making) == 0
	})
	return there
}

// dropUnnamed destroys sandboxes that a caller gave no id, which must run.
func (h *host) dropUnnamed(what string) {
	h.t.Helper()
	for _, v := range h.List() {
		if v.ID == "sb-1" {
			continue
		}
		if v.State != sandbox.Running {
			h.t.Errorf("%s: %s is %s", what, v.ID, v.State)
		}
		h.must(request1(h, sandbox.Use, v.ID))
		h.must(h.Destroy(h.c, v.ID))
	}
}

// killEverywhere lives a life again and again, with hutchd killed at each of
// its calls to the host in turn.
func killEverywhere(t *testing.T, life func(*host)) {
	t.Helper()
	testenv.CheckGoroutines(t)
	for _, after := range []bool{false, true} {
		for n := 0; ; n++ {
			w := newWorld(t)
			h := start(t, w)
			h.s.mu.Lock()
			first := h.s.calls
			h.s.faults = func(i int, _ string) (error, error) {
				switch {
				case i != first+n:
					return nil, nil
				case after:
					return nil, errKilled
				}
				return errKilled, nil
			}
			h.s.mu.Unlock()
			life(h)
			h.s.mu.Lock()
			dead, name := h.s.dead, h.s.names[min(first+n, len(h.s.names)-1)]
			h.s.mu.Unlock()
			if !dead {
				if n < 20 {
					t.Errorf("the life of a sandbox has only %d calls", n)
				}
				w.checkEmpty(t)
				h.stop(true)
				break
			}
			what := fmt.Sprintf("killed at call %d (%s), after its effect: %v", n, name, after)
			h.die()
			takeOver(t, w, what)
		}
	}
}

// takeOver starts a hutchd after another was killed, and checks what it finds.
func takeOver(t *testing.T, w *world, what string) {
	t.Helper()
	h := start(t, w)
	for _, v := range h.List() {
		h.settled(v.ID)
	}
	w.checkWhole(t, h.List())
	w.checkSnapshots(t, h)
	h.dropUnnamed(what)
	views := h.List()
	if len(views) > 1 {
		t.Errorf("%s: %d sandboxes", what, len(views))
	}
	last := sandbox.Gone
	if len(views) == 1 {
		last = views[0].State
		if err := h.Resume(h.c, "sb-1"); err != nil {
			t.Errorf("%s: resume from %s: %v", what, last, err)
		}
		h.must(request1(h, sandbox.Use, "sb-1"))
	} else {
		h.create("sb-1", plain)
	}
	if s := w.story("sb-1"); len(views) == 1 && !slices.ContainsFunc(s, func(e string) bool { return strings.HasPrefix(e, string(last)) }) {
		t.Errorf("%s: found %s, told %v", what, last, s)
	}
	h.must(h.Destroy(h.c, "sb-1"))
	w.checkEmpty(t)
	if t.Failed() {
		t.Fatal(what)
	}
	h.stop(true)
}

// TestEveryCallFails lets each call to the host fail once, before or after its
// effect.
func TestEveryCallFails(t *testing.T) {
	testenv.CheckGoroutines(t)
	for n := 0; ; n++ {
		w := newWorld(t)
		h := start(t, w)
		h.s.mu.Lock()
		first := h.s.calls
		h.s.faults = func(i int, _ string) (error, error) {
			if i == first+n {
				return errInjected, nil
			}
			return nil, nil
		}
		h.s.mu.Unlock()
		const id = "sb-1"
		_, err := h.Create(h.c, id, plain)
		for range 3 { // what a patient caller does
			for _, f := range []func() error{
				func() error { return h.Pause(h.c, id) },
				func() error { return h.Resume(h.c, id) },
			} {
				if h.state(id) != sandbox.Gone {
					err = errors.Join(err, f())
				}
			}
		}
		h.settled(id)
		h.s.mu.Lock()
		over, name := h.s.calls <= first+n, h.s.names[min(first+n, len(h.s.names)-1)]
		h.s.mu.Unlock()
		if err != nil && !errors.Is(err, errInjected) && !fault.Is(err, fault.Precondition) {
			t.Errorf("call %d (%s): %v", n, name, err)
		}
		for h.state(id) != sandbox.Gone {
			_ = h.Destroy(h.c, id) // may fail once
		}
		w.checkEmpty(t)
		h.stop(true)
		if t.Failed() {
			t.Fatalf("failed: call %d (%s)", n, name)
		}
		if over {
			return
		}
	}
}

func TestAdoption(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	for _, to := range []sandbox.State{sandbox.Running, sandbox.Paused, sandbox.Stopped, sandbox.Failed} {
		bring(t, h, sandbox.ID("sb-"+string(to)), to)
	}
	h.create("sb-dies", plain)
	h.create("sb-vanishes", plain)
	h.create("sb-sleeps", plain)
	h.create("sb-pauses", plain)
	h.create("sb-runs", plain)
	h.must(h.Pause(h.c, "sb-runs"))
	before := h.List()
	h.die()

	// Meanwhile some end, and others are not as their records say.
	w.crash(t, "sb-dies")
	w.powerOff(t, "sb-sleeps")
	trackless := w.vm(t, "sb-vanishes").ident.Process.PID
	w.crash(t, "sb-vanishes")
	w.mu.Lock()
	delete(w.exits, trackless)
	for _, vm := range w.vms {
		switch vm.spec.ID {
		case "sb-pauses":
			vm.running = false
		case "sb-runs":
			vm.running = true
		}
	}
	w.mu.Unlock()
	h = start(t, w)
	want := map[sandbox.ID]sandbox.State{
		"sb-running": sandbox.Running, "sb-paused": sandbox.Paused, "sb-stopped": sandbox.Stopped, "sb-error": sandbox.Failed,
		"sb-dies": sandbox.Failed, "sb-vanishes": sandbox.Failed, "sb-sleeps": sandbox.Stopped, "sb-pauses": sandbox.Running, "sb-runs": sandbox.Running,
	}
	got := map[sandbox.ID]sandbox.State{}
	for i, v := range h.List() {
		got[v.ID] = v.State
		if v.ID != before[i].ID || v.State == sandbox.Running && v.ActiveAt.Before(before[i].ActiveAt) {
			t.Errorf("%s: active at %v, before %s at %v", v.ID, v.ActiveAt, before[i].ID, before[i].ActiveAt)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	w.checkWhole(t, h.List())
	if w.launched != 9 {
		t.Errorf("%d VMs were launched, want 9", w.launched)
	}
	for id, want := range map[string]string{
		"sb-dies":     "crash: its VMM ended while hutchd was not running: crashed: signal 11 [31mlast words",
		"sb-vanishes": "crash: its VMM ended while hutchd was not running",
		"sb-sleeps":   "guest: its VMM ended while hutchd was not running: guest powered off",
	} {
		if v, _ := h.Get(id); string(v.Cause)+": "+v.Reason != want {
			t.Errorf("%s: %s: %s, want %s", id, v.Cause, v.Reason, want)
		}
	}
	for _, v := range h.List() {
		h.must(h.Resume(h.c, v.ID))
		h.must(request1(h, sandbox.Use, v.ID))
		h.must(h.Destroy(h.c, v.ID))
	}
	w.checkEmpty(t)
	h.stop(true)
}

func TestHostRestart(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	bring(t, h, "sb-2", sandbox.Stopped)
	h.die()
	w.reboot()
	h = start(t, w)
	v := h.reach("sb-1", sandbox.Failed)
	if v.Cause != sandbox.ByHost || v.Reason != "the host was restarted" {
		t.Errorf("%s %q", v.Cause, v.Reason)
	}
	h.reach("sb-2", sandbox.Stopped)
	h.must(h.Resume(h.c, "sb-1"))
	w.checkWhole(t, h.List())
}

// A VM that is alive but can't be taken up is never forgotten.
func TestAdoptionThatFails(t *testing.T) {
	for _, call := range []string{"Adopt", "Slots.Adopt"} {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", plain)
		h.die()
		h = prepare(t, w)
		h.s.faults = func(_ int, name string) (error, error) {
			if name == call {
				return errInjected, nil
			}
			return nil, nil
		}
		h.must(h.Start(h.c))
		h.settled("sb-1")
		v, err := h.Get("sb-1")
		h.must(err)
		if want := map[string]sandbox.State{"Adopt": sandbox.Broken, "Slots.Adopt": sandbox.Failed}[call]; v.State != want || !strings.Contains(v.Reason, errInjected.Error()) {
			t.Errorf("%s: %s %q", call, v.State, v.Reason)
		}
		h.s.mu.Lock()
		h.s.faults = nil
		h.s.mu.Unlock()
		h.must(h.Destroy(h.c, "sb-1"))
		w.mu.Lock()
		if len(w.vms) != 0 {
			t.Errorf("%s: a VM is left", call)
		}
		w.mu.Unlock()
		h.stop(true)
	}
}

func TestQuarantine(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	for _, id := range []sandbox.ID{"sb-good", "sb-worse"} {
		h.create(id, plain)
	}
	h.create("sb-bad", sandbox.Spec{Template: "big"})
	bad, _ := h.Get("sb-bad")
	h.die()
	record := func(id string) string { return filepath.Join(w.root, "sandboxes", id, "record.json") }
	b, err := os.ReadFile(record("sb-bad"))
	h.must(err)
	newer := strings.Replace(string(b), `"version": 1`, `"version": 77`, 1)
	h.must(os.WriteFile(record("sb-bad"), []byte(newer), 0o600))

	check := func(h *host, quarantined ...string) {
		t.Helper()
		var names []string
		for _, q := range h.Quarantined() {
			names = append(names, q.Name)
		}
		if diff := cmp.Diff(quarantined, names); diff != "" {
			t.Errorf("quarantined (-want +got):\n%s", diff)
		}
		w.vm(t, "sb-bad") // lives on
		if w.mu.Lock(); !w.slots[bad.Slot] {
			t.Error("its slot was taken")
		}
		w.mu.Unlock()
		if _, err := os.Stat(filepath.Join(w.run, "sandboxes", "sb-bad")); err != nil {
			t.Error(err)
		}
		_, err := h.Get("sb-bad")
		wants(t, err, fault.Precondition)
		wants(t, h.Destroy(h.c, "sb-bad"), fault.Precondition)
		_, err = h.Create(h.c, "sb-bad", plain)
		wants(t, err, fault.Exists)
		h.must(request1(h, sandbox.Use, "sb-good"))
	}
	h = start(t, w)
	check(h, "sb-bad")
	if digests, all := h.ImagesInUse(); !all || !cmp.Equal(digests, map[string]bool{"sha256:1": true, "sha256:2": true}) {
		t.Errorf("images in use: %v, all %v", digests, all)
	}
	h.reach("sb-worse", sandbox.Running)
	if v := h.create("sb-new", plain); v.Slot == bad.Slot {
		t.Error("its slot was given away")
	}
	h.must(h.Destroy(h.c, "sb-new"))
	h.die()

	// What says nothing at all may own any slot.
	h.must(os.WriteFile(record("sb-worse"), []byte("{"), 0o600))
	h = start(t, w)
	check(h, "sb-bad", "sb-worse")
	if _, all := h.ImagesInUse(); all {
		t.Error("all images in use are known, though one says nothing")
	}
	w.vm(t, "sb-worse")
	if w.mu.Lock(); len(w.slots) != 3 {
		t.Errorf("slots %v, want three", w.slots)
	}
	w.mu.Unlock()
	h.stop(true)
}

func TestTrashIsTold(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.die()
	trashed := filepath.Join(w.root, "trash", "sandbox.sb-1.0123456789abcdef")
	if err := os.Rename(filepath.Join(w.root, "sandboxes", "sb-1"), trashed); err != nil {
		t.Fatal(err)
	}
	start(t, w)
	w.checkEmpty(t)
	if diff := cmp.Diff([]string{"pending/user", "running/user", "gone/host"}, w.story("sb-1")); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func TestCloseLeavesVMsRunning(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	gate := h.s.gate("Ready")
	made := async(func() error { _, err := h.Create(h.c, "sb-2", plain); return err })
	holds(t, "pending", func() bool { return h.state("sb-2") == sandbox.Pending })
	_ = gate
	h.stop(true)
	wants(t, <-made, fault.Unavailable) // a start in flight is taken back
	pid := w.vm(t, "sb-1").ident.Process.PID
	if len(w.vms) != 1 || len(w.slots) != 1 {
		t.Errorf("%d VMs, %d slots", len(w.vms), len(w.slots))
	}
	h = start(t, w)
	if v := h.reach("sb-1", sandbox.Running); v.Pid != pid || len(h.List()) != 1 {
		t.Errorf("pid %d, before %d", v.Pid, pid)
	}
	h.stop(true)
}

func TestCloseStopsVMs(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		testenv.CheckGoroutines(t)
		w := newWorld(t)
		w.deaf = deaf
		h := start(t, w, func(p *Params) { p.StopGrace = 1 })
		if deaf { // the margin is not for tests
			h.s.faults = func(_ int, name string) (error, error) {
				if name == "Shutdown" {
					return errInjected, nil
				}
				return nil, nil
			}
		}
		for i := range 20 {
			h.create(sandbox.ID(fmt.Sprint("sb-", i)), plain)
		}
		h.must(h.Pause(h.c, "sb-0"))
		h.stop(false)
		if len(w.vms)+len(w.slots) != 0 {
			t.Errorf("deaf %v: %d VMs, %d slots are left", deaf, len(w.vms), len(w.slots))
		}
		h = start(t, w)
		for _, v := range h.List() {
			if v.State != sandbox.Stopped || v.Cause != sandbox.ByHost {
				t.Errorf("deaf %v: %s is %s by %s", deaf, v.ID, v.State, v.Cause)
			}
		}
		h.must(h.Resume(h.c, "sb-0"))
		h.stop(true)
	}
}
