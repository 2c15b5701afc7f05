package lifecycle

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// config is what the guest of a sandbox was told last.
func (h *host) config(id sandbox.ID) (bootID, machineID string) {
	h.t.Helper()
	g, done, err := h.Use(h.c, id)
	h.must(err)
	defer done()
	fake := g.(*fakeGuest)
	fake.mu.Lock()
	defer fake.mu.Unlock()
	if fake.config.ID != string(id) {
		h.t.Errorf("%s was configured as %s", id, fake.config.ID)
	}
	return fake.config.BootID, fake.config.MachineID
}

func TestForks(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	spec := plain
	spec.Labels, spec.DefaultEnv = map[string]string{"a": "b"}, map[string]string{"E": "1"}
	src := h.create("sb-1", spec)
	memory := h.memory("sb-1")
	source := sandbox.ID("sb-1")
	machines := map[string]bool{}
	for generation := range 3 {
		paused := generation == 1
		if paused {
			h.must(h.Pause(h.c, source))
		}
		f, err := h.Fork(h.c, source, 3)
		h.must(err)
		if len(f.Views) != 3 || f.Stopped <= 0 {
			t.Fatalf("%+v", f)
		}
		for _, v := range f.Views {
			if v.State != sandbox.Running || v.Parent != source || v.Spec.Labels["a"] != "b" || v.Spec.DefaultEnv["E"] != "1" || v.HostIP == src.HostIP {
				t.Errorf("fork: %+v", v)
			}
			if got := h.memory(v.ID); got != memory {
				t.Errorf("%s knows %q, its source %q", v.ID, got, memory)
			}
			bootID, machineID := h.config(v.ID)
			if bootID == "" || machines[bootID] || machines[machineID] {
				t.Errorf("%s has boot id %q and machine id %q, which are not its own", v.ID, bootID, machineID)
			}
			machines[bootID], machines[machineID] = true, true
		}
		if want := map[bool]sandbox.State{false: sandbox.Running, true: sandbox.Paused}[paused]; h.state(source) != want {
			t.Errorf("the source is %s, was %s", h.state(source), want)
		}
		if paused {
			h.must(h.Resume(h.c, source))
		}
		if h.memory(source) != memory {
			t.Errorf("the source knows %q", h.memory(source))
		}
		source = f.Views[0].ID
	}
	w.checkWhole(t, h.List())
	w.checkSnapshots(t, h)
}

func TestForksThatAreRefused(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Limits.MaxMemoryMB = 4 * 138 })
	h.create("sb-1", plain)
	h.create("sb-2", plain)
	h.must(h.Hibernate(h.c, "sb-2"))
	for what, c := range map[string]struct {
		id    sandbox.ID
		count int
		want  fault.Class
	}{
		"none": {"sb-1", 0, fault.Invalid}, "many": {"sb-1", maxForks + 1, fault.Invalid}, "unknown": {"sb-3", 1, fault.NotFound},
		"asleep": {"sb-2", 1, fault.Precondition}, "no room": {"sb-1", 4, fault.Exhausted},
	} {
		if _, err := h.Fork(h.c, c.id, c.count); !fault.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := h.Fork(h.c, "sb-1", 3); err != nil {
		t.Errorf("as many as there is room for: %v", err)
	}
	w.checkWhole(t, h.List())
}

// TestForkIsAllOrNothing breaks each step of one copy, and of the capture.
func TestForkIsAllOrNothing(t *testing.T) {
	steps := []string{"fork capture", "fork disk"}
	o := &boot{}
	for _, s := range slices.Concat(o.firstSteps(), o.copySteps(), o.lastSteps()) {
		steps = append(steps, "fork "+s.name)
	}
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{step: step}
			h := start(t, w, func(p *Params) { p.Break = br.hook })
			h.create("sb-1", plain)
			if _, err := h.Fork(h.c, "sb-1", 3); err == nil || !br.hit || !strings.Contains(err.Error(), "injected") {
				t.Errorf("hit %v: %v", br.hit, err)
			}
			h.memory("sb-1")
			if n := len(h.List()); n != 1 {
				t.Errorf("%d sandboxes are left", n)
			}
			w.checkWhole(t, h.List())
			w.checkSnapshots(t, h)
			_, err := h.Fork(h.c, "sb-1", 1)
			h.must(err)
		})
	}
}

func TestForkForNobody(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.s.gate("Restore")
	ctx, cancel := context.WithCancel(h.c)
	forked := async(func() error { _, err := h.Fork(ctx, "sb-1", 2); return err })
	holds(t, "copies are on their way", func() bool { return len(h.List()) == 3 })
	cancel()
	if err := <-forked; err == nil {
		t.Error("it worked")
	}
	if n := len(h.List()); n != 1 {
		t.Errorf("%d sandboxes are left", n)
	}
	w.checkWhole(t, h.List())
	w.checkSnapshots(t, h)
}

// TestADestroyEndsAFork destroys the source while it is copied.
func TestADestroyEndsAFork(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", plain)
	h.s.gate("VM.Save")
	forked := async(func() error { _, err := h.Fork(h.c, "sb-1", 2); return err })
	holds(t, "held", func() bool {
		vm := w.vm(t, "sb-1")
		w.mu.Lock()
		defer w.mu.Unlock()
		return vm.held && !vm.running
	})
	h.must(h.Destroy(h.c, "sb-1"))
	wants(t, <-forked, fault.Precondition)
	w.checkEmpty(t)
	w.checkSnapshots(t, h)
}
