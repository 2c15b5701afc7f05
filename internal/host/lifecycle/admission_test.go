package lifecycle

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestMaxSandboxes(t *testing.T) {
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Limits.MaxSandboxes = 2 })
	h.create("sb-1", plain)
	bring(t, h, "sb-2", sandbox.Stopped) // counts too
	_, err := h.Create(h.c, "sb-3", plain)
	wants(t, err, fault.Exhausted)
	h.create("sb-1", plain) // a repeated request needs no room
	h.must(h.Destroy(h.c, "sb-2"))
	h.create("sb-3", plain)
}

func TestMemoryBudget(t *testing.T) {
	w := newWorld(t)
	// Room for two guests of 128 MiB and their VMMs of 10.
	h := start(t, w, func(p *Params) { p.Limits.MaxMemoryMB = 280 })
	h.create("sb-1", plain)
	h.create("sb-2", plain)
	_, err := h.Create(h.c, "sb-3", plain)
	wants(t, err, fault.Exhausted)
	h.must(h.Pause(h.c, "sb-2")) // keeps its memory
	_, err = h.Create(h.c, "sb-3", plain)
	wants(t, err, fault.Exhausted)
	w.powerOff(t, "sb-1")
	h.reach("sb-1", sandbox.Stopped)
	h.settled("sb-1")
	h.create("sb-3", plain)
	wants(t, h.Resume(h.c, "sb-1"), fault.Exhausted)
	h.is("sb-1", sandbox.Stopped)
	h.stop(true)

	// The next hutchd counts those that it adopts.
	h = start(t, w, func(p *Params) { p.Limits.MaxMemoryMB = 280 })
	wants(t, h.Resume(h.c, "sb-1"), fault.Exhausted)
	h.must(h.Destroy(h.c, "sb-3"))
	h.must(h.Resume(h.c, "sb-1"))
}

func TestHostWithoutRoom(t *testing.T) {
	w := newWorld(t)
	w.capacity = Capacity{MemoryMB: 1000, DiskMB: 100}
	h := start(t, w, func(p *Params) { p.Limits.MinFreeMemoryMB, p.Limits.MinFreeDiskMB = 700, 50 })
	// What boots has not taken its memory yet, so it is counted.
	gate := h.s.gate("Ready")
	first := async(func() error { _, err := h.Create(h.c, "sb-1", plain); return err })
	second := async(func() error { _, err := h.Create(h.c, "sb-2", plain); return err })
	holds(t, "both boot", func() bool { return len(h.List()) == 2 })
	_, err := h.Create(h.c, "sb-3", plain)
	wants(t, err, fault.Exhausted)
	if !strings.Contains(err.Error(), "memory") {
		t.Errorf("%v", err)
	}
	close(gate)
	h.must(<-first)
	h.must(<-second)
	h.create("sb-3", plain)
	w.mu.Lock()
	w.capacity.DiskMB = 49
	w.mu.Unlock()
	_, err = h.Create(h.c, "sb-4", plain)
	wants(t, err, fault.Exhausted)
	if !strings.Contains(err.Error(), "disk") {
		t.Errorf("%v", err)
	}
	w.powerOff(t, "sb-1")
	h.reach("sb-1", sandbox.Stopped)
	h.must(h.Resume(h.c, "sb-1")) // has its disk
}

func TestQueueIsFairAndBounded(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Limits.MaxStarts, p.Limits.MaxQueue = 2, 5 })
	gate := h.s.gate("Launch")
	id := func(i int) sandbox.ID { return sandbox.ID(fmt.Sprintf("sb-%d", i)) }
	var made [7]<-chan error
	for i := range made {
		made[i] = async(func() error { _, err := h.Create(h.c, id(i), plain); return err })
		holds(t, "it is in the queue", func() bool { return len(h.List()) == i+1 })
	}
	_, err := h.Create(h.c, "sb-more", plain)
	wants(t, err, fault.Exhausted)
	h.must(h.Destroy(h.c, id(4))) // leaves the queue
	wants(t, <-made[4], fault.Precondition)
	// Each that is done lets the one in that came first.
	var order []sandbox.ID
	for range 6 {
		gate <- nil
		holds(t, "one more runs", func() bool {
			for _, v := range h.List() {
				if v.State == sandbox.Running && !slices.Contains(order, v.ID) {
					order = append(order, v.ID)
					return true
				}
			}
			return false
		})
	}
	for i, c := range made {
		if i != 4 {
			h.must(<-c)
		}
	}
	// The two that boot at the same time may change places.
	for i, got := range order {
		want := []sandbox.ID{"sb-0", "sb-1", "sb-2", "sb-3", "sb-5", "sb-6"}
		if at := slices.Index(want, got); at > i+1 {
			t.Errorf("order %v, want about %v", order, want)
		}
	}
	close(gate)
	h.create("sb-more", plain)
	h.stop(true)
}

// 20 creates at once on a small host: each succeeds or is refused with an
// error that says to try again, and nothing is left of the refused ones.
func TestBurst(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Limits.MaxStarts, p.Limits.MaxQueue = 2, 6 })
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := h.Create(h.c, "", plain); err != nil && !fault.Is(err, fault.Exhausted) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	views := h.List()
	if len(views) < 8 {
		t.Errorf("%d were made, there was room for 8", len(views))
	}
	w.checkWhole(t, views)
	for _, v := range views {
		h.must(h.Destroy(h.c, v.ID))
	}
	w.checkEmpty(t)
	h.stop(true)
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"a\tb\r\nc": "a b c", "\x1b[31mred\x00": "[31mred", "ä\u202eb": "äb", "\xff": "", strings.Repeat("x", 50): strings.Repeat("x", 17) + "...",
	} {
		if got := printable(in, 20); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}
