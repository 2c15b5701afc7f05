package lifecycle

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// withSpare starts a hutchd that has a spare of the plain shape.
func withSpare(t *testing.T, w *world, change ...func(*Params)) *host {
	t.Helper()
	h := start(t, w, append(change, func(p *Params) { p.Warm.Spares = 1 })...)
	_, err := h.WarmTemplate(h.c, plain, "")
	h.must(err)
	v := h.create("", plain)
	if !h.spareIsReady() {
		t.Fatal("there is no spare")
	}
	h.must(h.Destroy(h.c, v.ID))
	return h
}

func TestSpares(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := withSpare(t, w)
	if list := h.List(); len(list) != 0 {
		t.Errorf("a spare is listed: %v", list)
	}
	w.checkWhole(t, h.views())
	if v := h.views()[0]; v.State != sandbox.Paused || v.Spec.Timeout != spareTime || v.Spec.OnTimeout != sandbox.DestroyOnTimeout {
		t.Errorf("the spare: %+v", v)
	}
	told := len(w.told())
	spec := plain
	spec.Labels, spec.DefaultEnv, spec.Timeout = map[string]string{"a": "b"}, map[string]string{"E": "1"}, 77e9
	spec.Network = sandbox.Policy{Mode: sandbox.ModeNone}
	v := h.create("", spec)
	if got := strings.Join(stageNames(v), " "); got != "spare configure" {
		t.Errorf("stages: %s", got)
	}
	if v.Spec.Labels["a"] != "b" || v.Spec.Timeout != spec.Timeout || v.Spec.Purpose != "" || v.Boots != 1 || v.Snapshot == "" {
		t.Errorf("%+v", v)
	}
	if got := h.memory(v.ID); !strings.HasPrefix(got, "boot 1 of warm-") {
		t.Errorf("it knows %q", got)
	}
	g, done, err := h.Use(h.c, v.ID)
	h.must(err)
	if c := g.(*fakeGuest).config; c.Env["E"] != "1" || c.ID != string(v.ID) || c.MachineID != v.MachineID {
		t.Errorf("configured as %+v", c)
	}
	done()
	w.mu.Lock()
	if p := w.policies[v.Slot]; p.Mode != sandbox.ModeNone {
		t.Errorf("its policy is %v", p)
	}
	w.mu.Unlock()
	if d := cmp.Diff([]string{"pending/user", "running/user"}, w.story(v.ID)); d != "" || len(w.told()) != told+2 {
		t.Error(d, w.told()[told:])
	}
	if h.spareIsReady(); len(h.views()) != 2 {
		t.Errorf("%d sandboxes, want one and a new spare", len(h.views()))
	}
	h.create("sb-named", plain) // a caller's id is not that of the spare
	h.create("", sandbox.Spec{VCPUs: 2, MemoryMB: 128, DiskMB: 64})
	w.checkWhole(t, h.views())
	h.stop(true)
	h = start(t, w)
	w.checkWhole(t, h.List())
	if n := len(h.views()); n != 3 {
		t.Errorf("%d sandboxes after a restart, want those of callers", n)
	}
}

// TestASpareThatFails breaks each step of a claim: the create works all the
// same.
func TestASpareThatFails(t *testing.T) {
	for _, step := range []string{"spare", "configure", "running"} {
		t.Run(step, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			br := &breaker{}
			h := withSpare(t, w, func(p *Params) { p.Break = br.hook })
			br.mu.Lock()
			br.step = "claim " + step
			br.mu.Unlock()
			v := h.create("", plain)
			br.mu.Lock()
			hit := br.hit
			br.mu.Unlock()
			if names := stageNames(v); !hit || !slices.Contains(names, "spare failed") || !slices.Contains(names, "restore") {
				t.Errorf("hit %v, stages %v", hit, names)
			}
			h.spareIsReady()
			holds(t, "the spare that failed is gone", func() bool { return len(h.views()) == 2 })
			w.checkWhole(t, h.views())
			if len(h.List()) != 1 {
				t.Errorf("listed: %v", h.List())
			}
		})
	}
}

func TestSparesTakeNobodysRoom(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := withSpare(t, w, func(p *Params) { p.Limits = Limits{MaxSandboxes: 2, MaxMemoryMB: 2 * 138} })
	h.create("sb-1", plain)
	h.create("sb-2", plain) // in the spare's place
	if n := len(h.views()); n != 2 {
		t.Errorf("%d sandboxes, want two", n)
	}
	_, err := h.Create(h.c, "", plain)
	wants(t, err, fault.Exhausted)
	h.must(h.Destroy(h.c, "sb-2"))
	h.create("", plain)
	h.spareIsReady()
	w.checkWhole(t, h.views())
}

// TestWarmingTakesNobodysRoom has a shape made warm by itself when there is room
// for one more sandbox, which a caller then wants.
func TestWarmingTakesNobodysRoom(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) {
		p.Warm.Auto, p.Limits = true, Limits{MaxMemoryMB: 2 * 138}
	})
	h.s.gate("VM.Save")
	h.create("sb-1", plain)
	holds(t, "the shape is being made warm", func() bool { return len(h.views()) == 2 })
	h.create("sb-2", plain)
	if n := len(h.views()); n != 2 {
		t.Errorf("%d sandboxes, want two", n)
	}
	h.s.mu.Lock()
	delete(h.s.gates, "VM.Save")
	h.s.mu.Unlock()
	h.must(h.Destroy(h.c, "sb-2"))
	h.must(h.Destroy(h.c, "sb-1"))
	holds(t, "the shape is warm in the end", func() bool {
		h.create("sb-3", plain) // whenever one is made, it is tried again
		h.must(h.Destroy(h.c, "sb-3"))
		list, err := h.p.Snapshots.List()
		return err == nil && len(list) == 1
	})
}

// TestSparesOfShapesUsedLast makes more shapes warm than there may be spares.
func TestSparesOfShapesUsedLast(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := withSpare(t, w)
	other := sandbox.Spec{VCPUs: 1, MemoryMB: 256, DiskMB: 64}
	_, err := h.WarmTemplate(h.c, other, "")
	h.must(err)
	h.create("", other)
	h.spareIsReady()
	holds(t, "the spare of the other shape is gone", func() bool { return len(h.views()) == 2 })
	if v := h.create("", other); stageNames(v)[0] != "spare" {
		t.Errorf("stages %v", stageNames(v))
	}
}
