package lifecycle

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

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

func TestStaleRunDirectories(t *testing.T) {
	w := newWorld(t)
	stale := filepath.Join(w.run, "sandboxes", "sb-gone")
	if err := os.MkdirAll(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	start(t, w)
	w.checkEmpty(t)
}
