package ports

import (
	"context"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/fault"
)

// How long to wait before a guest is asked again whose stream broke, though its
// sandbox runs.
const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 30 * time.Second
	steady       = 10 * time.Second
)

// What a guest may have changed: burst at once, and rate a second in the long
// run. More is read later, and the guest tells only the latest then.
const (
	burst = 4 * MaxBindings
	rate  = 256
)

// budget paces one guest. Only its follower uses it.
type budget struct {
	left float64
	at   time.Time
}

// spend takes cost, and returns how long to wait for it.
func (p *budget) spend(cost int, now time.Time) time.Duration {
	if p.at.IsZero() {
		p.left = burst
	} else {
		p.left = min(burst, p.left+now.Sub(p.at).Seconds()*rate)
	}
	p.at = now
	p.left -= float64(cost)
	if p.left >= 0 {
		return 0
	}
	return time.Duration(-p.left / rate * float64(time.Second))
}

// run follows the sandbox's guest whenever it runs, until the sandbox is gone.
func (b *box) run() {
	for {
		select {
		case <-b.ctx.Done():
			return
		case <-b.kick:
		}
		settle := time.NewTimer(b.t.p.settle)
		select {
		case <-b.haste:
		case <-settle.C:
		case <-b.ctx.Done():
		}
		settle.Stop()
		b.follow()
	}
}

// follow keeps a stream of what the guest publishes for as long as that can be.
// When the sandbox does not run, or its guest can't, it ends: the next state
// tells.
func (b *box) follow() {
	var pace budget
	for wait := firstBackoff; b.ctx.Err() == nil; wait = min(2*wait, lastBackoff) {
		began := time.Now()
		err := b.watch(&pace)
		if b.ctx.Err() != nil {
			return
		}
		b.t.p.Log.Debug("guest tells no more of its ports", "sandbox_id", b.id, "error", err)
		switch fault.Of(err) {
		case fault.NotFound, fault.Precondition, fault.Denied, fault.Unimplemented:
			return
		default:
		}
		if time.Since(began) > steady {
			wait = firstBackoff
		}
		if delay.For(b.ctx, wait) != nil {
			return
		}
	}
}

// watch reads one stream.
func (b *box) watch(pace *budget) error {
	b.t.mu.Lock()
	b.round++
	b.t.mu.Unlock()
	return b.t.p.Sandboxes.Watch(b.ctx, b.id, func(e Event) error {
		cost, err := b.heard(e)
		if err != nil {
			return err
		}
		if wait := pace.spend(cost, time.Now()); wait > 0 {
			return delay.For(b.ctx, wait)
		}
		return nil
	})
}

// heard does what an event of the guest says. cost is what that took.
func (b *box) heard(e Event) (cost int, err error) {
	b.t.mu.Lock()
	defer b.t.mu.Unlock()
	if b.over || b.t.closed {
		return 0, context.Canceled
	}
	switch e.Kind {
	case Changed:
		o, ok := clean(e.Owner)
		if !ok {
			b.t.p.Log.Debug("guest names no owner of ports", "sandbox_id", b.id)
			break
		}
		cost = b.setLocked(o)
		if o := b.owners[o.ID]; o != nil {
			o.round = b.round
		}
	case Removed:
		// What is reserved is for the owner's next life.
		if o := b.owners[e.Owner.ID]; o != nil && o.expire == nil {
			b.removeLocked(o.id)
		}
	case Synced:
		for id, o := range b.owners {
			if o.round < b.round && o.expire == nil {
				b.removeLocked(id)
			}
		}
	}
	return cost + 1, nil
}
