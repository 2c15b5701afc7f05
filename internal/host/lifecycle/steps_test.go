package lifecycle

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

var createStepNames = []string{"record", "queue", "slot", "disk", "launch", "hello", "configure", "running"}

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
	for _, s := range slices.Concat(o.firstSteps(), o.bootSteps(), o.lastSteps()) {
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
	for _, name := range []string{"record", "guest connection", "VM", "shares", "network slot", "run directory", "files"} {
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
