package ports

import "context"

// Kind is what an Event tells.
type Kind uint8

// The kinds.
const (
	Changed Kind = iota + 1 // the full set of one owner
	Removed                 // an owner that publishes nothing any more
	Synced                  // all that was there when the watch began has been told
)

// Event is one thing that a watch tells.
type Event struct {
	Sequence uint64
	Kind     Kind
	Owner    Owner // of Removed only its ID; of Synced none
}

// Watch is one reader of a board. It is used by one goroutine, but for Close.
type Watch struct {
	board *Board
	kick  chan struct{}

	// What follows is guarded by board.mu.

	pending map[string]uint64 // owners to be told of; the sequence of a removal, 0: what the board says
	told    map[string]bool   // owners that the reader believes to be there
	first   map[string]bool   // those of pending that come before Synced; nil: that is not known yet
	synced  bool
}

// Watch returns a reader, which must be closed.
func (b *Board) Watch() *Watch {
	w := &Watch{board: b, kick: make(chan struct{}, 1), pending: map[string]uint64{}, told: map[string]bool{}}
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := range b.owners {
		w.pending[id] = 0
	}
	b.watches[w] = struct{}{}
	return w
}

// Close ends the watch.
func (w *Watch) Close() {
	w.board.mu.Lock()
	defer w.board.mu.Unlock()
	delete(w.board.watches, w)
}

// Next returns the next event, and waits for it.
func (w *Watch) Next(ctx context.Context) (Event, error) {
	for {
		if e, ok := w.take(); ok {
			return e, nil
		}
		select {
		case <-w.kick:
		case <-ctx.Done():
			return Event{}, context.Cause(ctx)
		}
	}
}

// take returns what is to be told now: of the pending the oldest.
func (w *Watch) take() (Event, bool) {
	b := w.board
	b.mu.Lock()
	defer b.mu.Unlock()
	if w.first == nil && b.settledLocked() {
		w.first = map[string]bool{}
		for id := range w.pending {
			w.first[id] = true
		}
	}
	if w.first != nil && len(w.first) == 0 && !w.synced {
		w.synced = true
		return Event{Sequence: b.sequence, Kind: Synced}, true
	}
	return w.oldestLocked()
}

// oldestLocked takes the pending owner with the lowest sequence. board.mu is
// held.
func (w *Watch) oldestLocked() (Event, bool) {
	var best Event
	for id, removed := range w.pending {
		e := Event{Sequence: removed, Kind: Removed, Owner: Owner{ID: id}}
		if removed == 0 {
			at := w.board.owners[id]
			e = Event{Sequence: at.sequence, Kind: Changed, Owner: at.Owner}
		}
		if best.Kind == 0 || e.Sequence < best.Sequence {
			best = e
		}
	}
	if best.Kind == 0 {
		return best, false
	}
	id := best.Owner.ID
	delete(w.pending, id)
	delete(w.first, id)
	if best.Kind == Changed {
		w.told[id] = true
	} else {
		delete(w.told, id)
	}
	return best, true
}

// changedLocked notes that an owner is to be told of. board.mu is held.
func (w *Watch) changedLocked(id string) {
	w.pending[id] = 0
	w.wake()
}

// removedLocked notes that an owner is gone. One that the reader never heard of
// need not be told: so no more is pending than what the reader knows and what is
// on the board. board.mu is held.
func (w *Watch) removedLocked(id string, sequence uint64) {
	delete(w.first, id)
	delete(w.pending, id)
	if w.told[id] {
		w.pending[id] = sequence
	}
	w.wake() // Synced may be due
}

func (w *Watch) wake() {
	select {
	case w.kick <- struct{}{}:
	default: // it will look
	}
}
