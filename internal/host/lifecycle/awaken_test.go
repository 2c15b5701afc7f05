package lifecycle

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// users is how many use a sandbox at the same time.
const users = 24

// callsOf counts the calls of a name to the host.
func (h *host) callsOf(name string) (n int) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	for _, c := range h.s.names {
		if c == name {
			n++
		}
	}
	return n
}

// useAll has many use a sandbox, and returns when all are on their way.
func (h *host) useAll(id sandbox.ID) (results <-chan error) {
	h.t.Helper()
	c := make(chan error, users)
	var wg sync.WaitGroup
	for range users {
		wg.Go(func() { c <- request1(h, sandbox.Use, id) })
	}
	go func() { wg.Wait(); close(c) }()
	b := h.lookup(id)
	holds(h.t, "all want it", func() bool { return h.wanted(b) == users })
	return c
}

// wanted is how many uses of a sandbox are on their way.
func (h *host) wanted(b *box) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wanted
}

func wakeable() sandbox.Spec {
	s := plain
	s.AutoResume = true
	return s
}

// sleepers are the states that a use wakes from, and the call to the host that
// does it.
func sleepers() map[sandbox.State]string {
	return map[sandbox.State]string{sandbox.Paused: "VM.Resume", sandbox.Hibernated: "Restore"}
}

func TestUseWakesOnce(t *testing.T) {
	for state, call := range sleepers() {
		t.Run(string(state), func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			h := start(t, w)
			h.create("sb-1", wakeable())
			memory := h.memory("sb-1")
			h.must(bringBack(h, "sb-1", state))
			before := h.callsOf(call)
			gate := h.s.gate(call)
			results := h.useAll("sb-1")
			resumed := async(func() error { return h.Resume(h.c, "sb-1") })
			close(gate)
			for err := range results {
				if err != nil {
					t.Error(err)
				}
			}
			h.must(<-resumed)
			if n := h.callsOf(call) - before; n != 1 {
				t.Errorf("woken %d times", n)
			}
			if got := h.memory("sb-1"); got != memory {
				t.Errorf("it woke with %q", got)
			}
			w.checkWhole(t, h.List())
			told := w.told()
			if last := told[len(told)-1]; last.State != sandbox.Running || last.Cause != sandbox.ByUser || last.Message != "resumed by use" {
				t.Errorf("told %+v", last)
			}
		})
	}
}

// bringBack pauses or hibernates a sandbox that runs.
func bringBack(h *host, id sandbox.ID, to sandbox.State) error {
	if to == sandbox.Paused {
		return h.Pause(h.c, id)
	}
	return h.Hibernate(h.c, id)
}

// TestUseCannotWake: one attempt, whose error all get, and the next is new.
func TestUseCannotWake(t *testing.T) {
	for state, call := range sleepers() {
		t.Run(string(state), func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			h := start(t, w)
			bringOf(t, h, "sb-1", wakeable(), state)
			gate := h.s.gate(call)
			results := h.useAll("sb-1")
			gate <- errInjected
			for err := range results { // a second attempt would wait at the gate for ever
				if !errors.Is(err, errInjected) {
					t.Errorf("got %v", err)
				}
			}
			h.is("sb-1", state)
			w.checkWhole(t, h.List())
			close(gate)
			h.must(request1(h, sandbox.Use, "sb-1"))
			h.is("sb-1", sandbox.Running)
		})
	}
}

func TestUseIsRefusedForWantOfMemory(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Limits.MaxMemoryMB = 150 })
	bringOf(t, h, "sb-1", wakeable(), sandbox.Hibernated)
	h.create("sb-2", plain) // which has the room now
	for err := range h.useAllAtOnce("sb-1") {
		wants(t, err, fault.Exhausted)
	}
	h.is("sb-1", sandbox.Hibernated)
	h.must(h.Destroy(h.c, "sb-2"))
	h.must(request1(h, sandbox.Use, "sb-1"))
	w.checkWhole(t, h.List())
}

// useAllAtOnce is useAll where nothing holds them up.
func (h *host) useAllAtOnce(id sandbox.ID) <-chan error {
	c := make(chan error, users)
	var wg sync.WaitGroup
	for range users {
		wg.Go(func() { c <- request1(h, sandbox.Use, id) })
	}
	wg.Wait()
	close(c)
	return c
}

func TestWhoGivesUpLeavesTheResumeRunning(t *testing.T) {
	for state, call := range sleepers() {
		t.Run(string(state), func(t *testing.T) {
			testenv.CheckGoroutines(t)
			h := start(t, newWorld(t))
			bringOf(t, h, "sb-1", wakeable(), state)
			gate := h.s.gate(call)
			ctx, cancel := context.WithCancel(h.c)
			used := async(func() error { _, _, err := h.Use(ctx, "sb-1"); return err })
			b := h.lookup("sb-1")
			holds(t, "asked for", func() bool { return b.wakeAsked() != nil })
			cancel()
			wants(t, <-used, fault.Canceled)
			gate <- nil
			h.reach("sb-1", sandbox.Running)
			h.settled("sb-1")
			if v, _ := h.Get("sb-1"); v.InFlight != 0 {
				t.Errorf("%d in flight", v.InFlight)
			}
		})
	}
}

// TestLooksDoNotWake asks for all that is no use.
func TestLooksDoNotWake(t *testing.T) {
	for state := range sleepers() {
		h := start(t, newWorld(t))
		bringOf(t, h, "sb-1", wakeable(), state)
		wants(t, h.KeepAlive(h.c, "sb-1"), fault.Precondition)
		_, _, err := h.Memory(h.c, "sb-1")
		wants(t, err, fault.Precondition)
		wants(t, h.WatchPorts(h.c, "sb-1", nil), fault.Precondition)
		h.List()
		_, err = h.Wait(h.c, "sb-1", state)
		h.must(err)
		h.is("sb-1", state)
		h.create("sb-1", wakeable()) // the same request
		h.is("sb-1", state)
	}
	for _, state := range []sandbox.State{sandbox.Stopped, sandbox.Failed} { // no use boots one
		h := start(t, newWorld(t))
		bringOf(t, h, "sb-1", wakeable(), state)
		wants(t, request1(h, sandbox.Use, "sb-1"), fault.Precondition)
		h.is("sb-1", state)
	}
}

func TestDestroyComesBeforeWaking(t *testing.T) {
	for state, call := range sleepers() {
		t.Run(string(state), func(t *testing.T) {
			testenv.CheckGoroutines(t)
			w := newWorld(t)
			h := start(t, w)
			bringOf(t, h, "sb-1", wakeable(), state)
			h.s.gate(call)
			results := h.useAll("sb-1")
			h.must(h.Destroy(h.c, "sb-1"))
			for err := range results {
				if !fault.Is(err, fault.NotFound) && !fault.Is(err, fault.Precondition) {
					t.Errorf("got %v", err)
				}
			}
			w.checkEmpty(t)
		})
	}
}

func TestStopComesBeforeWaking(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	bringOf(t, h, "sb-1", wakeable(), sandbox.Hibernated)
	h.s.gate("Restore")
	results := h.useAll("sb-1")
	h.stop(true)
	for err := range results {
		wants(t, err, fault.Unavailable)
	}
	h = start(t, w)
	w.checkWhole(t, h.List())
	h.must(request1(h, sandbox.Use, "sb-1"))
}

// TestUseAtEveryStepOfATimeout begins a use in the middle of a hibernation that
// a timeout began: it is served, and is activity.
func TestUseAtEveryStepOfATimeout(t *testing.T) {
	for _, step := range []string{"hibernate capture", "hibernate write", "hibernate record", "free"} {
		for _, auto := range []bool{false, true} {
			if !auto && slices.Contains([]string{"hibernate record", "free"}, step) {
				continue // it sleeps already
			}
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				used := make(chan error, 1)
				var h *host
				var once sync.Once
				h = start(t, w, func(p *Params) {
					p.Break = func(_ context.Context, _ sandbox.ID, at string) error {
						if at == step {
							once.Do(func() {
								go func() { used <- request1(h, sandbox.Use, "sb-1") }()
								b := h.lookup("sb-1")
								for h.wanted(b) == 0 {
									<-time.After(1)
								}
							})
						}
						return nil
					}
				})
				spec := then(sandbox.HibernateOnTimeout)
				spec.AutoResume = auto
				h.create("sb-1", spec)
				memory := h.memory("sb-1")
				pass(minute)
				if err := <-used; err != nil {
					t.Errorf("%s: %v", step, err)
				}
				h.is("sb-1", sandbox.Running)
				if got := h.memory("sb-1"); got != memory {
					t.Errorf("%s: it goes on with %q", step, got)
				}
				w.checkWhole(t, h.List())
				for _, e := range w.told() {
					if strings.Contains(e.Message, "try again") {
						t.Errorf("%s: told %+v", step, e)
					}
				}
				pass(minute - time.Second)
				h.is("sb-1", sandbox.Running)
				pass(time.Second)
				h.is("sb-1", sandbox.Hibernated)
			})
		}
	}
}

// TestUseInTheMomentOfATimeout has both at the same instant, again and again.
func TestUseInTheMomentOfATimeout(t *testing.T) {
	for _, o := range []sandbox.OnTimeout{sandbox.PauseOnTimeout, sandbox.HibernateOnTimeout} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			h := start(t, w)
			h.create("sb-1", light(o))
			for range 200 {
				h.must(request1(h, sandbox.Use, "sb-1"))
				<-time.After(minute)
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() {
						if err := request1(h, sandbox.Use, "sb-1"); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
			w.checkWhole(t, h.List())
		})
	}
}

// A use that waits for the driver while the time runs out comes first.
func TestUseOnItsWayIsActivity(t *testing.T) {
	for range 20 { // the driver's choice between the two would be by chance
		synctest.Test(t, func(t *testing.T) {
			h := start(t, newWorld(t))
			h.create("sb-1", timed())
			b := h.lookup("sb-1")
			goOn := make(chan struct{})
			busy := async(func() error {
				return b.ask(h.c, sandbox.Snapshot, true, func() error { <-goOn; return nil })
			})
			synctest.Wait()
			used := async(func() error { return request1(h, sandbox.Use, "sb-1") })
			pass(minute)
			close(goOn)
			h.must(<-busy)
			if err := <-used; err != nil {
				t.Error(err)
			}
			pass(minute - 1)
			h.is("sb-1", sandbox.Running)
			pass(1)
			h.is("sb-1", sandbox.Gone)
		})
	}
}

// What is refused is no activity.
func TestRefusedUseIsNoActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", then(sandbox.HibernateOnTimeout))
		h.must(h.Pause(h.c, "sb-1"))
		gate := h.s.gate("VM.Save")
		pass(minute)
		wants(t, request1(h, sandbox.Use, "sb-1"), fault.Precondition)
		wants(t, h.KeepAlive(h.c, "sb-1"), fault.Precondition)
		gate <- nil
		pass(1)
		h.is("sb-1", sandbox.Hibernated)
		if diff := cmp.Diff([]string{"pending/user", "running/user", "paused/user", "hibernated/ttl"}, w.story("sb-1")); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	})
}

// A hibernation that a caller asked for is not ended by a use, which waits and
// wakes the sandbox again.
func TestUseDuringAHibernationByHand(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", wakeable())
	gate := h.s.gate("VM.Save")
	slept := async(func() error { return h.Hibernate(h.c, "sb-1") })
	vm := w.vm(t, "sb-1")
	holds(t, "held", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return vm.held && !vm.running
	})
	results := h.useAll("sb-1")
	close(gate)
	h.must(<-slept)
	for err := range results {
		if err != nil {
			t.Error(err)
		}
	}
	if n := h.callsOf("Restore"); n != 1 {
		t.Errorf("woken %d times", n)
	}
	w.checkWhole(t, h.List())
}
