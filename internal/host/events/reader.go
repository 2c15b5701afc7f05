package events

import (
	"context"
	"errors"
	"os"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// MaxBatch is the largest number of events that one call returns.
const MaxBatch = 256

// Batch is some events in a row.
type Batch struct {
	// Missed is how many numbers between the cursor and the first of Events
	// are not retained any more.
	Missed int64
	Events []sandbox.Event
}

// Reader reads events in order. It holds nothing open and need not be closed;
// it is used by one goroutine at a time.
type Reader struct {
	l     *Log
	after int64
}

// Subscribe returns a reader of the events after a sequence: 0 reads from the
// oldest that is retained, -1 only what is yet to come. A sequence that was
// never given out is fault.Invalid.
func (l *Log) Subscribe(after int64) (*Reader, error) {
	last := l.Last()
	if after == -1 {
		after = last
	}
	if after < 0 || after > last {
		return nil, fault.BadField("after", "%d is no event of this host, the latest is %d; read from 0", after, last)
	}
	return &Reader{l: l, after: after}, nil
}

// Next returns the next events, at least one, and waits for them. A reader
// that gets Missed events all the time is too slow for what happens.
func (r *Reader) Next(ctx context.Context) (Batch, error) {
	for {
		r.l.mu.Lock()
		changed := r.l.changed
		r.l.mu.Unlock()
		b, err := r.Read()
		if err != nil || len(b.Events) > 0 {
			return b, err
		}
		select {
		case <-changed:
		case <-r.l.done:
			return Batch{}, errClosed()
		case <-ctx.Done():
			return Batch{}, context.Cause(ctx)
		}
	}
}

// Read returns the next events that are there now, none when it has read all.
func (r *Reader) Read() (Batch, error) {
	b, err := r.l.Since(r.after)
	if n := len(b.Events); n > 0 {
		r.after = b.Events[n-1].Sequence
	}
	return b, err
}

// Since returns at most MaxBatch events after a sequence. They are in a row: a
// gap ends the batch, and the next one tells of it as Missed.
func (l *Log) Since(after int64) (Batch, error) {
	for {
		b, err := l.since(after)
		if !errors.Is(err, os.ErrClosed) {
			return b, err
		}
		select {
		case <-l.done:
			return Batch{}, errClosed()
		default: // the segment was dropped meanwhile, see what there is now
		}
	}
}

func (l *Log) since(after int64) (Batch, error) {
	l.mu.Lock()
	segments := make([]segment, len(l.segments))
	for i, s := range l.segments {
		segments[i] = *s
	}
	pending := l.pending[:len(l.pending):len(l.pending)]
	l.mu.Unlock()

	var b Batch
	next := after + 1
	add := func(e sandbox.Event) bool {
		switch {
		case e.Sequence < next:
			return true
		case len(b.Events) == MaxBatch, len(b.Events) > 0 && e.Sequence != next:
			return false
		case len(b.Events) == 0:
			b.Missed = e.Sequence - next
		}
		b.Events = append(b.Events, e)
		next = e.Sequence + 1
		return true
	}
	for i := range segments {
		if i+1 < len(segments) && segments[i+1].first <= next {
			continue // all of it was read
		}
		if err := segments[i].read(next-1, add); err != nil {
			return Batch{}, err
		}
	}
	for _, e := range pending {
		add(e)
	}
	return b, nil
}
