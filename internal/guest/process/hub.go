package process

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// segmentBytes is the most that one read, one segment and one event carry.
const segmentBytes = 32 << 10

// segmentCost is charged for a segment beside its bytes, so that a program
// that writes single bytes to alternating streams can't make the log large.
const segmentCost = 96

// minRetain is what a stream may keep when the table's budget is used up.
const minRetain = 2 * segmentBytes

// segment is a run of output of one stream. Bytes are only ever appended, so
// that readers may hold slices of it without the lock.
type segment struct {
	start uint64 // position in the output of the whole program
	data  []byte
}

func (s *segment) end() uint64 { return s.start + uint64(len(s.data)) }

// track is the retained output of one stream.
type track struct {
	stream Stream
	segs   []segment
	charge int
}

// budget is the memory that retained output takes in the whole table.
type budget struct {
	used atomic.Int64
	max  int64
}

// hub is the output log of one program and the meeting point of its readers
// (the pumps) and its subscriptions.
type hub struct {
	limit  int
	stall  time.Duration
	budget *budget

	mu      sync.Mutex
	tracks  []*track
	total   uint64 // bytes of output so far
	kept    uint64 // bytes in the tracks
	subs    map[*Subscription]struct{}
	exit    *Exit
	waiting int           // pumps in room
	changed chan struct{} // closed and renewed when room may have come up
}

func newHub(streams []Stream, limit int, stall time.Duration, b *budget) *hub {
	h := &hub{limit: limit, stall: stall, budget: b, subs: map[*Subscription]struct{}{}, changed: make(chan struct{})}
	for _, s := range streams {
		h.tracks = append(h.tracks, &track{stream: s})
	}
	return h
}

// Subscription follows the output of one program from where it was taken. It
// is used by one goroutine; Close may come from any.
type Subscription struct {
	hub    *hub
	ready  chan struct{}
	missed uint64

	// Under hub.mu.
	cursor uint64
	moved  time.Time // when it last took something, or first could have
	lost   bool
	closed bool
}

// Missed returns how many bytes of earlier output were not retained.
func (s *Subscription) Missed() uint64 { return s.missed }

func (h *hub) subscribe() *Subscription {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &Subscription{hub: h, ready: make(chan struct{}, 1), moved: time.Now(), missed: h.total - h.kept}
	h.subs[s] = struct{}{}
	return s
}

// Close detaches s. The program no longer waits for it.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.closed = true
	s.hub.drop(s)
}

// Next returns the next piece of output, or the end of the program, waiting
// for it. When nothing comes for idle, it returns an event of kind Idle; 0
// waits without limit. After End it returns End again. It fails when ctx ends,
// after Close, and with an Exhausted error when the program was held up for
// too long by this subscription. Data is shared and must not be changed.
func (s *Subscription) Next(ctx context.Context, idle time.Duration) (Event, error) {
	var timeout <-chan time.Time
	for {
		ev, ok, err := s.take()
		if ok || err != nil {
			return ev, err
		}
		if timeout == nil && idle > 0 {
			t := time.NewTimer(idle)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-s.ready:
		case <-timeout:
			return Event{Kind: Idle}, nil
		case <-ctx.Done():
			return Event{}, context.Cause(ctx)
		}
	}
}

func (s *Subscription) take() (Event, bool, error) {
	h := s.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case s.lost:
		return Event{}, false, fault.New(fault.Exhausted,
			"output not taken for %s while the program waited: subscription cut off; connect again to go on from the retained output", h.stall)
	case s.closed:
		return Event{}, false, fault.New(fault.Canceled, "subscription closed")
	}
	best, stream := (*segment)(nil), Stream(0)
	for _, t := range h.tracks {
		if seg := t.after(s.cursor); seg != nil && (best == nil || seg.start < best.start) {
			best, stream = seg, t.stream
		}
	}
	if best != nil {
		from := max(s.cursor, best.start)
		data := best.data[from-best.start : len(best.data) : len(best.data)]
		s.cursor = best.end()
		s.moved = time.Now()
		h.wakePumps()
		return Event{Kind: Data, Stream: stream, Data: data}, true, nil
	}
	if h.exit != nil {
		return Event{Kind: End, Exit: *h.exit}, true, nil
	}
	return Event{}, false, nil
}

// after returns the first segment that holds something behind pos.
func (t *track) after(pos uint64) *segment {
	lo, hi := 0, len(t.segs)
	for lo < hi {
		mid := (lo + hi) / 2
		if t.segs[mid].end() > pos {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == len(t.segs) {
		return nil
	}
	return &t.segs[lo]
}

// drop forgets s. Called with the lock held.
func (h *hub) drop(s *Subscription) {
	delete(h.subs, s)
	h.wakePumps()
	s.wake()
}

func (s *Subscription) wake() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (h *hub) wakePumps() {
	if h.waiting == 0 {
		return
	}
	close(h.changed)
	h.changed = make(chan struct{})
}

// append adds output. The caller waited for room before.
func (h *hub) append(stream Stream, data []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.track(stream)
	for s := range h.subs {
		if s.cursor == h.total {
			s.moved = time.Now()
		}
	}
	grown := len(data)
	if n := len(t.segs); n > 0 && t.segs[n-1].end() == h.total && len(t.segs[n-1].data)+len(data) <= segmentBytes {
		t.segs[n-1].data = append(t.segs[n-1].data, data...)
	} else {
		t.segs = append(t.segs, segment{start: h.total, data: append([]byte(nil), data...)})
		grown += segmentCost
	}
	t.charge += grown
	h.budget.used.Add(int64(grown))
	h.total += uint64(len(data))
	h.kept += uint64(len(data))
	h.trim(t)
	for s := range h.subs {
		s.wake()
	}
}

func (h *hub) track(stream Stream) *track {
	for _, t := range h.tracks {
		if t.stream == stream {
			return t
		}
	}
	panic("process: output of a stream that the program does not have")
}

// trim drops the oldest segments of t beyond the limit that nobody waits for,
// and reports whether there is room for more.
func (h *hub) trim(t *track) bool {
	limit := h.limit
	if h.budget.used.Load() > h.budget.max {
		limit = min(limit, minRetain)
	}
	if t.charge <= limit {
		return true
	}
	needed := h.total
	for s := range h.subs {
		needed = min(needed, s.cursor)
	}
	n := 0
	for t.charge > limit && n < len(t.segs) && t.segs[n].end() <= needed {
		h.forget(t, &t.segs[n])
		n++
	}
	if n == len(t.segs) {
		t.segs = nil
	} else {
		t.segs = t.segs[n:]
	}
	return t.charge <= limit
}

func (h *hub) forget(t *track, seg *segment) {
	cost := len(seg.data) + segmentCost
	t.charge -= cost
	h.budget.used.Add(-int64(cost))
	h.kept -= uint64(len(seg.data))
	seg.data = nil
}

// room waits until the stream may take another read. It cuts off the
// subscriptions that hold it up without taking anything. It fails when stop is
// closed.
func (h *hub) room(stream Stream, stop <-chan struct{}) bool {
	for {
		h.mu.Lock()
		if h.trim(h.track(stream)) {
			h.mu.Unlock()
			return true
		}
		wait := h.cutStalled(time.Now())
		changed := h.changed
		h.waiting++
		h.mu.Unlock()
		stopped := false
		if wait > 0 {
			t := time.NewTimer(wait)
			select {
			case <-changed:
			case <-t.C:
			case <-stop:
				stopped = true
			}
			t.Stop()
		}
		h.mu.Lock()
		h.waiting--
		h.mu.Unlock()
		if stopped {
			return false
		}
	}
}

// cutStalled drops the subscriptions whose time is over and returns how long
// the next one has; 0 when some were dropped. Called with the lock held.
func (h *hub) cutStalled(now time.Time) time.Duration {
	next := h.stall
	cut := false
	for s := range h.subs {
		if s.cursor == h.total {
			continue
		}
		left := h.stall - now.Sub(s.moved)
		if left <= 0 {
			s.lost, cut = true, true
			h.drop(s)
			continue
		}
		next = min(next, left)
	}
	if cut {
		return 0
	}
	return next
}

// end records the exit: nothing is appended afterwards.
func (h *hub) end(e Exit) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.exit = &e
	for s := range h.subs {
		s.wake()
	}
}

// release forgets the retained output that no subscription waits for.
func (h *hub) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	needed := h.total
	for s := range h.subs {
		needed = min(needed, s.cursor)
	}
	for _, t := range h.tracks {
		n := 0
		for n < len(t.segs) && t.segs[n].end() <= needed {
			h.forget(t, &t.segs[n])
			n++
		}
		t.segs = append([]segment(nil), t.segs[n:]...)
	}
}

// abandon gives the memory of the log back to the budget, for a log that
// nobody can find any more. Subscriptions that are still reading keep it alive
// for themselves.
func (h *hub) abandon() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.tracks {
		h.budget.used.Add(-int64(t.charge))
		t.charge = 0
	}
}
