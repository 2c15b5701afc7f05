package lifecycle

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// then is a sandbox of which o becomes of at the end of a minute.
func then(o sandbox.OnTimeout) sandbox.Spec {
	s := timed()
	s.OnTimeout = o
	return s
}

// light is one that a use wakes as well.
func light(o sandbox.OnTimeout) sandbox.Spec {
	s := then(o)
	s.AutoResume = true
	return s
}

// bringAt is bringOf where time is not the world's.
func bringAt(t *testing.T, h *host, spec sandbox.Spec, to sandbox.State) (release func()) {
	if to != sandbox.Pending {
		return bringOf(t, h, "sb-1", spec, to)
	}
	gate := h.s.gate("Ready")
	made := async(func() error { _, err := h.Create(h.c, "sb-1", spec); return err })
	synctest.Wait()
	return func() {
		gate <- nil
		h.must(<-made)
	}
}

// TestTimeoutInEveryState lets time pass in every state.
func TestTimeoutInEveryState(t *testing.T) {
	for _, o := range []sandbox.OnTimeout{"", sandbox.DestroyOnTimeout, sandbox.PauseOnTimeout, sandbox.HibernateOnTimeout} {
		awake := map[sandbox.OnTimeout]sandbox.State{
			sandbox.PauseOnTimeout: sandbox.Paused, sandbox.HibernateOnTimeout: sandbox.Hibernated,
		}[o]
		awake = orElse(awake, sandbox.Gone)
		for _, state := range sandbox.States() {
			if state == sandbox.Destroying { // which nothing can stop
				continue
			}
			t.Run(fmt.Sprintf("%s/%s", state, o), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					h := start(t, w)
					want, before := awake, state
					release := bringAt(t, h, then(o), state)
					switch state {
					case sandbox.Hibernated, sandbox.Stopped, sandbox.Failed, sandbox.Broken:
						want = state
					}
					if state == sandbox.Pending {
						pass(minute + 1)
						h.is("sb-1", state)
						release()
						before = sandbox.Running
					}
					pass(minute - 1)
					h.is("sb-1", before)
					pass(1)
					h.is("sb-1", want)
					pass(1000 * minute)
					h.is("sb-1", want)
					if state == sandbox.Broken {
						release()
					}
					if want != sandbox.Gone {
						h.must(h.Destroy(h.c, "sb-1"))
					}
					w.checkEmpty(t)
				})
			})
		}
	}
}

// TestTimeoutAgainAndAgain has one that sleeps resumed, and sleep again.
func TestTimeoutAgainAndAgain(t *testing.T) {
	for o, asleep := range map[sandbox.OnTimeout]sandbox.State{
		sandbox.PauseOnTimeout: sandbox.Paused, sandbox.HibernateOnTimeout: sandbox.Hibernated,
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			h := start(t, w)
			h.create("sb-1", then(o))
			memory := h.memory("sb-1")
			for range 3 {
				_, done, err := h.Use(h.c, "sb-1")
				h.must(err)
				pass(10 * minute)
				h.is("sb-1", sandbox.Running)
				done()
				pass(minute)
				h.is("sb-1", asleep)
				w.checkWhole(t, h.List())
				wants(t, request1(h, sandbox.Use, "sb-1"), fault.Precondition)
				h.must(h.Resume(h.c, "sb-1"))
				if got := h.memory("sb-1"); got != memory {
					t.Errorf("it woke with %q", got)
				}
			}
			last := h.w.told()[2]
			if last.State != asleep || last.Cause != sandbox.ByTTL || last.Message != "inactive for 1m0s" {
				t.Errorf("told %+v", last)
			}
		})
	}
}

// TestTimeoutIsTriedAgain has a disk that is full for an hour.
func TestTimeoutIsTriedAgain(t *testing.T) {
	for _, state := range []sandbox.State{sandbox.Running, sandbox.Paused} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			var tries []time.Time
			var space atomic.Bool
			h := start(t, w, func(p *Params) {
				p.Break = func(_ context.Context, _ sandbox.ID, step string) error {
					if step != "hibernate write" || space.Load() {
						return nil
					}
					tries = append(tries, time.Now())
					return fault.New(fault.Exhausted, "no space left on device")
				}
			})
			bringOf(t, h, "sb-1", then(sandbox.HibernateOnTimeout), state)
			pass(minute)
			h.is("sb-1", state)
			v, err := h.Get("sb-1")
			h.must(err)
			if v.Cause != sandbox.ByTTL || !strings.Contains(v.Reason, "inactive for 1m0s, will try again in 30s") || !strings.Contains(v.Reason, "no space left") {
				t.Errorf("%s: %s", v.Cause, v.Reason)
			}
			w.checkWhole(t, h.List())
			pass(60 * minute)
			h.is("sb-1", state)
			if n := len(tries); n < 8 || n > 12 {
				t.Errorf("tried %d times in an hour", n)
			}
			for i := 1; i < len(tries); i++ {
				if d := tries[i].Sub(tries[i-1]); d < retryTimeout || d > retryTimeoutMost {
					t.Errorf("tried again after %s", d)
				}
			}
			if state == sandbox.Running { // whoever uses it does not notice
				h.must(request1(h, sandbox.Use, "sb-1"))
				h.memory("sb-1")
			}
			space.Store(true)
			pass(retryTimeoutMost)
			h.is("sb-1", sandbox.Hibernated)
			if v, _ := h.Get("sb-1"); v.Reason != "inactive for 1m0s" {
				t.Errorf("reason %q", v.Reason)
			}
			w.checkWhole(t, h.List())
		})
	}
}

// A pause that fails is tried again as well.
func TestTimeoutCannotPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		br := &breaker{step: "pause"}
		h := start(t, newWorld(t), func(p *Params) { p.Break = br.hook })
		h.create("sb-1", then(sandbox.PauseOnTimeout))
		pass(minute)
		h.is("sb-1", sandbox.Running)
		pass(retryTimeout)
		h.is("sb-1", sandbox.Paused)
	})
}

// The VMM dies in the middle of a hibernation: that is told, not that.
func TestTimeoutOfOneThatDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", then(sandbox.HibernateOnTimeout))
		h.s.gate("VM.Save")
		pass(minute)
		w.crash(t, "sb-1")
		pass(1)
		h.is("sb-1", sandbox.Failed)
		if diff := cmp.Diff([]string{"pending/user", "running/user", "error/crash"}, w.story("sb-1")); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
		w.checkWhole(t, h.List())
	})
}

func TestTimeoutAcrossRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		specs := map[sandbox.ID]sandbox.Spec{
			"sb-0": timed(), "sb-1": then(sandbox.PauseOnTimeout), "sb-2": light(sandbox.HibernateOnTimeout), "sb-3": light(sandbox.PauseOnTimeout),
		}
		for id, spec := range specs {
			h.create(id, spec)
		}
		pass(minute)
		for range 2 {
			h.die()
			pass(10 * minute)
			h = start(t, w)
		}
		h.is("sb-0", sandbox.Gone)
		h.is("sb-1", sandbox.Paused)
		h.is("sb-2", sandbox.Hibernated)
		h.is("sb-3", sandbox.Paused)
		for id, spec := range specs {
			h.create(id, spec) // the same request
			spec.AutoResume = !spec.AutoResume
			_, err := h.Create(h.c, id, spec)
			wants(t, err, fault.Exists)
		}
		h.must(request1(h, sandbox.Use, "sb-2"))
		h.must(request1(h, sandbox.Use, "sb-3"))
		wants(t, request1(h, sandbox.Use, "sb-1"), fault.Precondition)
		pass(minute)
		h.is("sb-0", sandbox.Gone)
		h.is("sb-2", sandbox.Hibernated)
		h.is("sb-3", sandbox.Paused)
	})
}

// A record of before on_timeout is of a sandbox that its timeout destroys.
func TestTimeoutOfAnOlderRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", timed())
		h.stop(true)
		path := filepath.Join(w.root, "sandboxes", "sb-1", "record.json")
		b, err := os.ReadFile(path)
		h.must(err)
		var rec map[string]any
		h.must(json.Unmarshal(b, &rec))
		if got := rec["spec"].(map[string]any)["on_timeout"]; got != "destroy" {
			t.Errorf("the record says on_timeout %v", got)
		}
		delete(rec["spec"].(map[string]any), "on_timeout")
		b, err = json.Marshal(rec)
		h.must(err)
		h.must(os.WriteFile(path, b, 0o600))
		h = start(t, w)
		h.create("sb-1", timed()) // the same request
		pass(minute)
		h.is("sb-1", sandbox.Gone)
	})
}

// A fork ends its inactivity as its source does.
func TestTimeoutOfAFork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newWorld(t))
		h.create("sb-1", light(sandbox.PauseOnTimeout))
		f, err := h.Fork(h.c, "sb-1", 1)
		h.must(err)
		id := f.Views[0].ID
		pass(minute)
		h.is(id, sandbox.Paused)
		h.must(request1(h, sandbox.Use, id))
		h.is(id, sandbox.Running)
		h.is("sb-1", sandbox.Paused)
	})
}

func TestTimeoutsThatAreRefused(t *testing.T) {
	h := start(t, newWorld(t))
	for _, o := range []sandbox.OnTimeout{sandbox.DestroyOnTimeout, sandbox.PauseOnTimeout, sandbox.HibernateOnTimeout, "explode"} {
		spec := then(o)
		if o != "explode" {
			spec.Timeout = 0
		}
		_, err := h.Create(h.c, "sb-1", spec)
		wants(t, err, fault.Invalid)
		if !strings.HasPrefix(err.Error(), "on_timeout: ") || !strings.Contains(err.Error(), string(o)) {
			t.Errorf("%s: %v", o, err)
		}
	}
	awake := plain
	awake.AutoResume = true // of a pause by hand, too
	h.create("sb-1", awake)
	h.must(h.Pause(h.c, "sb-1"))
	h.must(request1(h, sandbox.Use, "sb-1"))
	h.is("sb-1", sandbox.Running)
}

// plainDriver can't write VMs down.
type plainDriver struct{ fakeDriver }

func (d plainDriver) Caps() vmm.Caps {
	c := d.fakeDriver.Caps()
	c.Snapshots = false
	return c
}

func TestHostThatCannotHibernate(t *testing.T) {
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Driver = plainDriver{p.Driver.(fakeDriver)} })
	_, err := h.Create(h.c, "sb-1", then(sandbox.HibernateOnTimeout))
	wants(t, err, fault.Unimplemented)
	if !strings.Contains(err.Error(), "on_timeout: fake can't hibernate") {
		t.Error(err)
	}
	w.checkEmpty(t)
	h.create("sb-1", then(sandbox.PauseOnTimeout))
}
