package network

import (
	"context"
	"sync"
)

// place is what the ledger knows of one index.
type place uint8

const (
	free     place = iota
	busy           // being built, changed or removed
	prepared       // built, waiting for a sandbox
	taken          // a sandbox has it
	setAside       // its removal failed
	foreign        // another root on this host has its address
)

// ledger says which index is what. It turns round instead of looking for the
// lowest free index, so that an address comes back as late as possible.
type ledger struct {
	total int

	mu      sync.Mutex
	places  map[int]place // guarded by mu; a free index is not in it
	ready   []int         // guarded by mu; the prepared ones, oldest first
	last    int           // guarded by mu; where the last search ended
	changed chan struct{} // guarded by mu; closed and replaced at every change
}

// newLedger makes a ledger of indices 1..total whose first search begins
// after start.
func newLedger(total, start int) *ledger {
	return &ledger{total: total, places: map[int]place{}, last: start % total, changed: make(chan struct{})}
}

func (l *ledger) setLocked(index int, p place) {
	if p == free {
		delete(l.places, index)
	} else {
		l.places[index] = p
	}
	if p == prepared {
		l.ready = append(l.ready, index)
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// next makes the next free index busy.
func (l *ledger) next() (index int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range l.total {
		l.last = l.last%l.total + 1
		if _, used := l.places[l.last]; !used {
			l.setLocked(l.last, busy)
			return l.last, true
		}
	}
	return 0, false
}

// nextPrepared makes the oldest prepared index busy.
func (l *ledger) nextPrepared() (index int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.ready) == 0 {
		return 0, false
	}
	index, l.ready = l.ready[0], l.ready[1:]
	l.setLocked(index, busy)
	return index, true
}

// begin waits until index is not busy, makes it busy and tells what it was.
// A prepared index is not touched and told as prepared.
func (l *ledger) begin(ctx context.Context, index int) (place, error) {
	for {
		l.mu.Lock()
		was, changed := l.places[index], l.changed
		if was != busy {
			if was != prepared {
				l.setLocked(index, busy)
			}
			l.mu.Unlock()
			return was, nil
		}
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return busy, ctx.Err()
		}
	}
}

// end says what a busy index is now.
func (l *ledger) end(index int, p place) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setLocked(index, p)
}

// is reports whether index is p.
func (l *ledger) is(index int, p place) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.places[index] == p
}

// count tells how many indices are one of ps.
func (l *ledger) count(ps ...place) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, have := range l.places {
		for _, p := range ps {
			if have == p {
				n++
			}
		}
	}
	return n
}

// setForeign notes which indices other roots hold now, and forgets the ones
// that they gave back. It reports whether any index became free.
func (l *ledger) setForeign(held map[int]bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	freed := false
	for index, p := range l.places {
		if p == foreign && !held[index] {
			delete(l.places, index)
			freed = true
		}
	}
	for index := range held {
		if l.places[index] == free && index <= l.total {
			l.places[index] = foreign
		}
	}
	return freed
}

// wait returns when ok holds, which it is asked again after every change.
func (l *ledger) wait(ctx context.Context, ok func() bool) error {
	for {
		l.mu.Lock()
		changed := l.changed
		l.mu.Unlock()
		if ok() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
