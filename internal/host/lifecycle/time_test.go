package lifecycle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// pass lets time pass, which in these tests is not the world's time, and has
// everything that is due done.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

const minute = time.Minute

func timed() sandbox.Spec {
	s := plain
	s.Timeout = minute
	return s
}

func (h *host) is(id sandbox.ID, want sandbox.State) {
	h.t.Helper()
	if got := h.state(id); got != want {
		h.t.Errorf("%s is %s, want %s", id, got, want)
	}
}

func TestInactivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", timed())
		pass(minute - 1)
		h.is("sb-1", sandbox.Running)
		pass(1)
		h.is("sb-1", sandbox.Gone)
		w.checkEmpty(t)
		if diff := cmp.Diff([]string{"pending/user", "running/user", "destroying/ttl", "gone/ttl"}, w.story("sb-1")); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
		if last := w.told()[3]; last.Message != "inactive for 1m0s" {
			t.Errorf("message %q", last.Message)
		}
	})
}

func TestUseInFlightIsActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newWorld(t))
		h.create("sb-1", timed())
		_, first, err := h.Use(h.c, "sb-1")
		h.must(err)
		pass(10 * minute)
		_, second, err := h.Use(h.c, "sb-1")
		h.must(err)
		first()
		pass(10 * minute)
		h.is("sb-1", sandbox.Running)
		second()
		pass(minute - 1)
		h.is("sb-1", sandbox.Running)
		pass(1)
		h.is("sb-1", sandbox.Gone)
	})
}

func TestActivityAtTheLastMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newWorld(t))
		h.create("sb-1", timed())
		pass(minute - 1)
		h.must(h.KeepAlive(h.c, "sb-1"))
		pass(minute - 1)
		h.must(request1(h, sandbox.Use, "sb-1"))
		pass(minute - 1)
		h.is("sb-1", sandbox.Running)
		pass(1)
		h.is("sb-1", sandbox.Gone)
		wants(t, h.KeepAlive(h.c, "sb-1"), fault.NotFound)
	})
}

func TestPausedIsInactive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newWorld(t))
		h.create("sb-1", timed())
		h.create("sb-2", timed())
		_, done, err := h.Use(h.c, "sb-2") // which stands still with its guest
		h.must(err)
		pass(minute / 2)
		h.must(h.Pause(h.c, "sb-1"))
		h.must(h.Pause(h.c, "sb-2"))
		wants(t, h.KeepAlive(h.c, "sb-1"), fault.Precondition)
		pass(minute / 2)
		h.is("sb-1", sandbox.Gone)
		h.is("sb-2", sandbox.Paused)
		done() // the caller gave up: no activity
		pass(minute/2 - 1)
		h.is("sb-2", sandbox.Paused)
		h.must(h.Resume(h.c, "sb-2")) // an activity
		pass(minute - 1)
		h.is("sb-2", sandbox.Running)
		pass(1)
		h.is("sb-2", sandbox.Gone)
		h.w.checkEmpty(t)
	})
}

func TestWithoutVMStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newWorld(t))
		for _, id := range []sandbox.ID{"sb-1", "sb-2", "sb-3"} {
			h.create(id, timed())
		}
		h.create("sb-4", plain) // has all the time in the world
		h.w.powerOff(t, "sb-1")
		h.w.crash(t, "sb-2")
		pass(1000 * minute)
		h.is("sb-1", sandbox.Stopped)
		h.is("sb-2", sandbox.Failed)
		h.is("sb-3", sandbox.Gone)
		h.is("sb-4", sandbox.Running)
		h.must(h.Resume(h.c, "sb-1"))
		pass(minute - 1)
		h.is("sb-1", sandbox.Running)
		pass(1)
		h.is("sb-1", sandbox.Gone)
	})
}

// A restart of hutchd counts as activity: nobody could use the sandbox before.
func TestInactivityAcrossRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", timed())
		h.create("sb-2", timed())
		h.must(h.Pause(h.c, "sb-2"))
		h.die()
		pass(10 * minute)
		h = start(t, w)
		pass(minute - 1)
		h.is("sb-1", sandbox.Running)
		h.is("sb-2", sandbox.Paused)
		pass(1)
		h.is("sb-1", sandbox.Gone)
		h.is("sb-2", sandbox.Gone)
		w.checkEmpty(t)
	})
}

func TestActivityIsWrittenDownOnceInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", plain)
		puts := func() (n int) {
			h.s.mu.Lock()
			defer h.s.mu.Unlock()
			for _, name := range h.s.names {
				if name == "Records.Put" {
					n++
				}
			}
			return n
		}
		before := puts()
		for range 600 {
			h.must(request1(h, sandbox.Use, "sb-1"))
			pass(time.Second)
		}
		if n := puts() - before; n < 9 || n > 10 {
			t.Errorf("600 uses in ten minutes wrote %d records, want one a minute", n)
		}
		last := time.Now()
		h.must(h.KeepAlive(h.c, "sb-1"))
		pass(persistEvery)
		quiet := puts()
		pass(100 * minute)
		if puts() != quiet {
			t.Error("a sandbox that nobody uses is written again and again")
		}
		b, err := os.ReadFile(filepath.Join(w.root, "sandboxes", "sb-1", "record.json"))
		h.must(err)
		var rec sandbox.Record
		h.must(json.Unmarshal(b, &rec))
		if !rec.ActiveAt.Equal(last) {
			t.Errorf("the record says %v, want %v", rec.ActiveAt, last)
		}
	})
}

// A record that could not be written is written when that works again.
func TestRecordIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", plain)
		h.s.mu.Lock()
		h.s.faults = func(_ int, name string) (error, error) {
			if name == "Records.Put" {
				return errInjected, nil
			}
			return nil, nil
		}
		h.s.mu.Unlock()
		h.must(h.Pause(h.c, "sb-1"))
		pass(minute)
		h.s.mu.Lock()
		h.s.faults = nil
		h.s.mu.Unlock()
		pass(retryEvery)
		b, err := os.ReadFile(filepath.Join(w.root, "sandboxes", "sb-1", "record.json"))
		h.must(err)
		var rec sandbox.Record
		h.must(json.Unmarshal(b, &rec))
		if rec.State != sandbox.Paused {
			t.Errorf("the record says %s", rec.State)
		}
	})
}

func TestGuestsAreToldTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newWorld(t))
		h.create("sb-1", plain)
		g, done, err := h.Use(h.c, "sb-1")
		h.must(err)
		done()
		guest := g.(*fakeGuest)
		active := h.List()[0].ActiveAt
		synctest.Wait()
		pass(syncFirst - time.Second)
		if n := len(guest.synced()); n != 0 {
			t.Errorf("told %d times right after it was configured, want none", n)
		}
		pass(2 * time.Second)
		if n := len(guest.synced()); n != 1 {
			t.Errorf("told %d times at the start, want once", n)
		}
		pass(10 * minute)
		told := guest.synced()
		if len(told) < 10 || len(told) > 21 {
			t.Errorf("told %d times in ten minutes", len(told))
		}
		for i := 1; i < len(told); i++ {
			if d := told[i].Sub(told[i-1]); d < syncLeast || d > 2*syncLeast {
				t.Errorf("told after %s", d)
			}
		}
		if !h.List()[0].ActiveAt.Equal(active) {
			t.Error("that counts as activity")
		}
		h.must(h.Pause(h.c, "sb-1"))
		before := len(guest.synced())
		pass(10 * minute)
		if len(guest.synced()) != before {
			t.Error("a paused guest was told")
		}
		h.must(h.Resume(h.c, "sb-1"))
		synctest.Wait()
		if len(guest.synced()) != before+1 {
			t.Error("not told right after the resume")
		}
	})
}

func TestStopGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.deaf = true
		h := start(t, w)
		h.create("sb-1", plain)
		began := time.Now()
		h.stop(false)
		if took := time.Since(began); took != 25*time.Second+killMargin {
			t.Errorf("a guest that does not power off was ended after %s", took)
		}
		h = start(t, w)
		h.is("sb-1", sandbox.Stopped)
	})
}
