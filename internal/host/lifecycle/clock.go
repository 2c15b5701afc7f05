package lifecycle

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// A guest is told the time when its clock sync starts, after each resume, and
// every syncLeast to twice that, at random so that guests spread. One that was
// just configured was told thereby; it is told again after syncFirst, when its
// caller's first program has most likely ended, which would wait for that in an
// emulated guest.
const (
	syncFirst   = 10 * time.Second
	syncLeast   = 30 * time.Second
	syncTimeout = 10 * time.Second
)

// clockSync keeps telling one guest the time. It is no activity.
type clockSync struct {
	now    chan struct{} // asks for a sync at once
	cancel context.CancelFunc
	done   chan struct{}
}

// startClock starts telling the guest the time, after first. What else is done
// for a guest every now and then is done on that beat.
func (b *box) startClock(first time.Duration) {
	ctx, cancel := context.WithCancel(b.m.life)
	c := &clockSync{now: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	b.clock = c
	guest := b.guest
	b.m.wg.Go(func() {
		defer close(c.done)
		b.keepTime(ctx, c, guest, first)
	})
}

func (b *box) keepTime(ctx context.Context, c *clockSync, guest guestconn.Guest, after time.Duration) {
	trims := trims{at: time.Now()}
	for c.wait(ctx, after) {
		after = syncLeast + rand.N(syncLeast)
		if b.pub.Load().rec.State == sandbox.Running {
			once, cancel := context.WithTimeout(ctx, syncTimeout)
			err := guest.SyncClock(once)
			cancel()
			if err != nil && ctx.Err() == nil {
				b.log.Debug("guest was not told the time", slog.Any("error", err))
			}
			b.trimIfDue(ctx, guest, &trims)
		}
	}
}

// wait waits for d or for soon. It reports false when ctx ends.
func (c *clockSync) wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-c.now:
	case <-timer.C:
	}
	return true
}

// soon has the guest told the time at once. c may be nil.
func (c *clockSync) soon() {
	if c == nil {
		return
	}
	select {
	case c.now <- struct{}{}:
	default: // it will be
	}
}

// stop ends it and waits for that. c may be nil.
func (c *clockSync) stop() {
	if c == nil {
		return
	}
	c.cancel()
	<-c.done
}
