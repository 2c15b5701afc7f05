package lifecycle

import (
	"log/slog"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// begin notes a use, in the driver's turn. The returned done ends it.
func (b *box) begin() (done func()) {
	b.mu.Lock()
	b.inFlight++
	b.mu.Unlock()
	return sync.OnceFunc(func() {
		// Paused guests do nothing, so a call that ends then was over before.
		paused := b.pub.Load().rec.State == sandbox.Paused
		b.mu.Lock()
		b.inFlight--
		if !paused {
			b.activeAt = time.Now()
		}
		b.mu.Unlock()
		b.wake()
	})
}

// active counts as activity now.
func (b *box) active() {
	b.mu.Lock()
	b.activeAt = time.Now()
	b.mu.Unlock()
}

func (b *box) lastActive() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.activeAt
}

// deadline returns when something is to be done about the sandbox's inactivity.
// ok is false when it is active or has all the time in the world.
func (b *box) deadline() (at time.Time, ok bool) {
	if b.rec.Spec.Timeout <= 0 {
		return at, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	at = b.activeAt.Add(b.rec.Spec.Timeout)
	if at.Before(b.backOff.until) {
		at = b.backOff.until
	}
	switch {
	case b.wanted > 0, b.stuck:
		return at, false
	case b.rec.State == sandbox.Running:
		return at, b.inFlight == 0
	case b.rec.State == sandbox.Paused:
		return at, b.rec.Spec.OnTimeout != sandbox.PauseOnTimeout
	}
	return at, false
}

// untilNext returns how long the driver may sleep when nothing happens.
func (b *box) untilNext() time.Duration {
	const forEver = 1000 * time.Hour
	wait := forEver
	if at, ok := b.deadline(); ok {
		wait = min(wait, time.Until(at))
	}
	if b.stuck {
		wait = min(wait, time.Until(b.lookedAt.Add(roomEvery)))
	}
	switch {
	case b.unsaved:
		wait = min(wait, time.Until(b.savedAt.Add(retryEvery)))
	case !b.lastActive().Equal(b.savedAct):
		wait = min(wait, time.Until(b.savedAt.Add(persistEvery)))
	}
	return max(wait, 0)
}

// onTimer does what is due. No use can begin between the look at the deadline
// and what is done then: both are in the driver's turn.
func (b *box) onTimer() {
	if at, ok := b.deadline(); ok && !time.Now().Before(at) {
		b.timeUp()
		return
	}
	if b.stuck && !time.Now().Before(b.lookedAt.Add(roomEvery)) {
		b.lookForRoom()
	}
	due := persistEvery
	if b.unsaved {
		due = retryEvery
	}
	if (b.unsaved || !b.lastActive().Equal(b.savedAct)) && !time.Now().Before(b.savedAt.Add(due)) {
		if err := b.save(); err != nil {
			b.log.Debug("record can't be written, will try again", slog.Any("error", err))
		}
	}
}
