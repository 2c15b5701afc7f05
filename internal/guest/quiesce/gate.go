package quiesce

import (
	"context"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
)

// gate lets starts of programs through, one by one, while it is open. A program
// that is forked into a frozen cgroup never gets to its exec, and the fork waits
// for that.
type gate struct {
	mu     sync.Mutex
	inside int
	shut   *shut // nil: open
}

// shut is one time that the gate was shut.
type shut struct {
	empty  chan struct{} // closed when nobody is inside
	opened chan struct{} // closed when the gate is open again
	refuse bool          // set before opened is closed: who waited is turned away
}

// Enter waits until a program may be started. A nil error is followed by Leave.
func (g *gate) Enter(ctx context.Context) error {
	for {
		s := g.enter()
		if s == nil {
			return nil
		}
		select {
		case <-s.opened:
			if s.refuse {
				return fault.New(fault.Unavailable, "start program: this machine was copied while the start waited, and the copy has no caller")
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// enter returns what to wait for, or nil when the caller is inside.
func (g *gate) enter() *shut {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == nil {
		g.inside++
	}
	return g.shut
}

// Leave says that the start is over, one way or the other.
func (g *gate) Leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	if g.inside == 0 && g.shut != nil {
		close(g.shut.empty)
	}
}

// close shuts the gate. It may be shut already.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut != nil {
		return
	}
	g.shut = &shut{empty: make(chan struct{}), opened: make(chan struct{})}
	if g.inside == 0 {
		close(g.shut.empty)
	}
}

// await waits until nobody is inside of the shut gate.
func (g *gate) await(ctx context.Context) error {
	g.mu.Lock()
	s := g.shut
	g.mu.Unlock()
	select {
	case <-s.empty:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// open opens the gate. With refuse, those who wait are turned away.
func (g *gate) open(refuse bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut != nil {
		g.shut.refuse = refuse
		close(g.shut.opened)
		g.shut = nil
	}
}

func (g *gate) isShut() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shut != nil
}
