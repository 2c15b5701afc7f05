package supervise

import (
	"cmp"
	"time"
)

// pace is how long things may take, and how often they are done.
type pace struct {
	// firstPause is the pause before a start that follows a failed one; it
	// doubles up to maxPause. steady is how long a program must have been ready
	// for its end to count as the first.
	firstPause, maxPause, steady time.Duration
	// firstLook and lastLook are the pauses between questions whether a program
	// is ready, which tells nobody by itself; ask bounds each.
	firstLook, lastLook, ask time.Duration
	prepare, kill            time.Duration
}

func (p *pace) setDefaults() {
	p.firstPause = cmp.Or(p.firstPause, 500*time.Millisecond)
	p.maxPause = cmp.Or(p.maxPause, 30*time.Second)
	p.steady = cmp.Or(p.steady, time.Minute)
	p.firstLook = cmp.Or(p.firstLook, 50*time.Millisecond)
	p.lastLook = cmp.Or(p.lastLook, 250*time.Millisecond)
	p.ask = cmp.Or(p.ask, 15*time.Second)
	p.prepare = cmp.Or(p.prepare, time.Minute)
	p.kill = cmp.Or(p.kill, 5*time.Second)
}

// backoff is how long to wait before the next start.
type backoff struct {
	pace pace
	next time.Duration
}

// after returns the pause after a program has ended, or was not started. The
// first end of one that had been ready has none: it was fine a moment ago.
func (b *backoff) after(wasReady bool, readyFor time.Duration) time.Duration {
	if readyFor >= b.pace.steady {
		b.next = 0
	}
	pause := b.next
	if !wasReady {
		pause = max(pause, b.pace.firstPause)
	}
	b.next = min(max(2*pause, b.pace.firstPause), b.pace.maxPause)
	return pause
}
