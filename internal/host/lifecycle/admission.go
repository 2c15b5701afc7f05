package lifecycle

import (
	"container/list"
	"context"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
)

// admission decides whether the host has room for one more VM, and lets a
// bounded number of them boot at the same time, first come first served.
type admission struct {
	limits   Limits
	overhead int // MiB of a VMM beyond its guest's memory
	capacity func() (Capacity, error)

	mu        sync.Mutex
	memoryMB  int        // of all VMs; guarded by mu
	bootingMB int        // of those that still boot; guarded by mu
	booting   int        // turns taken; guarded by mu
	waiting   *list.List // of *turn; guarded by mu
	// calm is closed and made anew when the last of those that boot is done.
	calm chan struct{}
}

// grant is room for one VM. Its methods are idempotent.
type grant struct {
	a       *admission
	mb      int
	booting bool // guarded by a.mu
	held    bool // guarded by a.mu
}

// turn is a place in the queue of boots, or, once ready is closed, the right
// to boot. Its methods are idempotent.
type turn struct {
	a     *admission
	ready chan struct{}
	place *list.Element // guarded by a.mu; nil when it has the right
	over  bool          // guarded by a.mu
}

func newAdmission(l Limits, overhead int, capacity func() (Capacity, error)) *admission {
	if capacity == nil {
		capacity = func() (Capacity, error) { return Capacity{MemoryMB: 1 << 40, DiskMB: 1 << 40}, nil }
	}
	return &admission{limits: l, overhead: overhead, capacity: capacity, waiting: list.New(), calm: make(chan struct{})}
}

// admit takes room for a VM with memoryMB of guest memory and a turn to boot
// it, or tells why there is none. newDisk says that it needs a new disk too.
func (a *admission) admit(memoryMB int, newDisk bool) (*grant, *turn, error) {
	free, err := a.capacity()
	if err != nil {
		return nil, nil, fault.New(fault.Unavailable, "ask the host for its capacity: %w", err)
	}
	need := memoryMB + a.overhead
	a.mu.Lock()
	defer a.mu.Unlock()
	switch l := a.limits; {
	case l.MaxMemoryMB > 0 && a.memoryMB+need > l.MaxMemoryMB:
		return nil, nil, fault.New(fault.Exhausted, "no memory for a sandbox of %d MiB: sandboxes have %d of %d MiB; destroy one or try later", memoryMB, a.memoryMB, l.MaxMemoryMB)
	case l.MinFreeMemoryMB > 0 && free.MemoryMB-a.bootingMB-need < l.MinFreeMemoryMB:
		return nil, nil, fault.New(fault.Exhausted, "no memory for a sandbox of %d MiB: the host has %d MiB available and keeps %d; destroy one or try later", memoryMB, free.MemoryMB, l.MinFreeMemoryMB)
	case newDisk && l.MinFreeDiskMB > 0 && free.DiskMB < l.MinFreeDiskMB:
		return nil, nil, fault.New(fault.Exhausted, "no disk space for a sandbox: %d MiB are free and %d must stay so; free some or try later", free.DiskMB, l.MinFreeDiskMB)
	case a.booting >= l.MaxStarts && a.waiting.Len() >= l.MaxQueue:
		return nil, nil, fault.New(fault.Exhausted, "%d sandboxes are starting and %d wait for it; try later", a.booting, a.waiting.Len())
	}
	t := &turn{a: a, ready: make(chan struct{})}
	if a.booting < a.limits.MaxStarts {
		a.booting++
		close(t.ready)
	} else {
		t.place = a.waiting.PushBack(t)
	}
	return a.takeLocked(need, true), t, nil
}

// take takes room for a VM that is alive already.
func (a *admission) take(memoryMB int) *grant {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.takeLocked(memoryMB+a.overhead, false)
}

func (a *admission) takeLocked(mb int, booting bool) *grant {
	a.memoryMB += mb
	if booting {
		a.bootingMB += mb
	}
	return &grant{a: a, mb: mb, booting: booting, held: true}
}

// booted says that what the VM takes shows in the host's numbers now.
func (g *grant) booted() {
	if g == nil {
		return
	}
	g.a.mu.Lock()
	defer g.a.mu.Unlock()
	g.bootedLocked()
}

func (g *grant) bootedLocked() {
	if g.booting {
		g.a.bootingMB -= g.mb
	}
	g.booting = false
}

// release gives the room back.
func (g *grant) release() {
	if g == nil {
		return
	}
	g.a.mu.Lock()
	defer g.a.mu.Unlock()
	g.bootedLocked()
	if g.held {
		g.a.memoryMB -= g.mb
	}
	g.held = false
}

// wait waits for the right to boot.
func (t *turn) wait(ctx context.Context) error {
	select {
	case <-t.ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// end leaves the queue, or passes the right on to the next in it.
func (t *turn) end() {
	if t == nil {
		return
	}
	a := t.a
	a.mu.Lock()
	defer a.mu.Unlock()
	if t.over {
		return
	}
	t.over = true
	if t.place != nil {
		a.waiting.Remove(t.place)
		return
	}
	if first := a.waiting.Front(); first != nil {
		next := a.waiting.Remove(first).(*turn)
		next.place = nil
		close(next.ready)
		return
	}
	if a.booting--; a.booting == 0 {
		close(a.calm)
		a.calm = make(chan struct{})
	}
}

// whenCalm waits until nothing boots.
func (a *admission) whenCalm(ctx context.Context) error {
	a.mu.Lock()
	booting, calm := a.booting, a.calm
	a.mu.Unlock()
	if booting == 0 {
		return nil
	}
	select {
	case <-calm:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
