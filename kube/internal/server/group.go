package server

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// group are parts that run until they are told to end.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	failed chan<- error
	wg     sync.WaitGroup
}

// newGroup makes a group; the first part that ends by itself is told to failed.
func newGroup(failed chan<- error) *group {
	ctx, cancel := context.WithCancel(context.Background())
	return &group{ctx: ctx, cancel: cancel, failed: failed}
}

// run runs a part that has to run until it is told to end.
func (g *group) run(name string, part func(context.Context) error) {
	g.start(func() error {
		err := part(g.ctx)
		if err == nil {
			return fmt.Errorf("%s ended", name)
		}
		return fmt.Errorf("%s ended: %w", name, err)
	})
}

// once runs a part that may come to its end.
func (g *group) once(name string, part func(context.Context) error) {
	g.start(func() error {
		if err := part(g.ctx); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
}

// leave runs a part that can't be ended and isn't waited for: the process ends it.
func (g *group) leave(name string, part func(context.Context) error) {
	go func() { g.tell(fmt.Errorf("%s ended: %v", name, part(g.ctx))) }()
}

func (g *group) start(part func() error) { g.wg.Go(func() { g.tell(part()) }) }

func (g *group) tell(err error) {
	if err == nil || g.ctx.Err() != nil {
		return
	}
	select {
	case g.failed <- err:
	default: // the first one counts
	}
}

// stop ends the parts and waits for them, at most for limit. It tells whether all ended.
func (g *group) stop(limit time.Duration) bool {
	g.cancel()
	done := make(chan struct{})
	go func() { defer close(done); g.wg.Wait() }()
	late := time.NewTimer(limit)
	defer late.Stop()
	select {
	case <-done:
		return true
	case <-late.C:
		return false
	}
}
