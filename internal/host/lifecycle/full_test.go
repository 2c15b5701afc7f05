package lifecycle

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// setRoom says how much room the host's disk has.
func (w *world) setRoom(mb int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.capacity.DiskMB = mb
}

// fill has the guest write more than the host's disk has room for.
func (w *world) fill(t testing.TB, id sandbox.ID) {
	t.Helper()
	w.setRoom(0)
	m := w.vm(t, id)
	w.mu.Lock()
	defer w.mu.Unlock()
	m.running = false
	close(m.full)
}

// TestFullDiskHoldsTheGuest for as long as it is full, over a restart of hutchd
// and over a timeout, and whatever people ask for meanwhile.
func TestFullDiskHoldsTheGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", then(sandbox.DestroyOnTimeout))
		held := func() {
			t.Helper()
			synctest.Wait()
			h.is("sb-1", sandbox.Paused)
			if v, err := h.Get("sb-1"); err != nil || v.Cause != sandbox.ByHost || !strings.Contains(v.Reason, "disk is full") {
				t.Errorf("its record says %s, %q, %v", v.Cause, v.Reason, err)
			}
			wants(t, request1(h, sandbox.Use, "sb-1"), fault.Precondition)
		}
		w.fill(t, "sb-1")
		held()
		pass(10 * minute)
		held()
		h.must(h.Resume(h.c, "sb-1"))
		h.is("sb-1", sandbox.Running)
		w.fill(t, "sb-1")
		held()
		w.setRoom(roomMB - 1)
		pass(10 * minute)
		held()
		h.stop(true)
		h = start(t, w)
		held()
		w.setRoom(roomMB)
		pass(roomEvery)
		h.is("sb-1", sandbox.Running)
		if told := w.told(); told[len(told)-1].Cause != sandbox.ByHost || !strings.Contains(told[len(told)-1].Message, "room again") {
			t.Errorf("told %+v", told[len(told)-1])
		}
		pass(minute)
		h.is("sb-1", sandbox.Gone) // its time goes on
		w.checkEmpty(t)
	})
}

// TestFullDiskAndAPause: who paused a sandbox has it stay paused, though its last
// writes found no room.
func TestFullDiskAndAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", plain)
		h.must(h.Pause(h.c, "sb-1"))
		w.fill(t, "sb-1")
		w.setRoom(1 << 20)
		for range 2 {
			pass(10 * minute)
			h.is("sb-1", sandbox.Paused)
			h.stop(true)
			h = start(t, w)
		}
		h.must(h.Resume(h.c, "sb-1"))
		h.is("sb-1", sandbox.Running)
		h.must(h.Destroy(h.c, "sb-1"))
		w.checkEmpty(t)
	})
}

// TestFullDiskWhileNobodyWatches: the guest stopped while no hutchd ran.
func TestFullDiskWhileNobodyWatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.create("sb-1", plain)
		h.stop(true)
		w.fill(t, "sb-1")
		w.setRoom(1 << 20)
		h = start(t, w)
		pass(roomEvery)
		h.is("sb-1", sandbox.Running)
		h.must(h.Destroy(h.c, "sb-1"))
		w.checkEmpty(t)
	})
}

// TestFullDiskEndsACreate at once, with a reason.
func TestFullDiskEndsACreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		h := start(t, w)
		h.s.gate("Ready")
		made := async(func() error { _, err := h.Create(h.c, "sb-1", plain); return err })
		synctest.Wait()
		w.fill(t, "sb-1")
		err := <-made
		wants(t, err, fault.Exhausted)
		if err == nil || !strings.Contains(err.Error(), "disk is full") {
			t.Errorf("%v", err)
		}
		h.is("sb-1", sandbox.Gone)
		w.checkEmpty(t)
	})
}
