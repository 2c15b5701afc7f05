package events

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

const (
	// DefaultSegmentBytes is the size at which a segment is full.
	DefaultSegmentBytes = 4 << 20
	// keepSegments is how many segments there are at most.
	keepSegments = 2
	// maxPending is how many events are kept in memory while none can be
	// written.
	maxPending = 1024
	// maxMessage caps the message of an event, in bytes: part of it may be a
	// guest's words.
	maxMessage = 4096
	// reserve is how many numbers are set aside at a time.
	reserve = 4096
	// syncEvery is how often events are made durable while there are new ones.
	syncEvery = time.Second
)

// Params is what a Log needs.
type Params struct {
	// Dir is an existing directory that only this Log uses.
	Dir string
	// SegmentBytes is the size at which a segment is full. 0:
	// DefaultSegmentBytes.
	SegmentBytes int64
	// BootID is the host's boot id. Empty: read from /proc.
	BootID string
	Log    *slog.Logger
}

// Log is an open log of events. It is safe for concurrent use.
type Log struct {
	p Params

	mu       sync.Mutex // guards what follows
	segments []*segment // oldest first; the last one is written to
	pending  []sandbox.Event
	last     int64 // sequence of the latest event
	reserved int64 // numbers up to here survive a loss of power
	changed  chan struct{}
	failing  bool // the last write failed and that was logged
	closed   bool

	dirty  chan struct{} // tells the syncer that there is something to do
	done   chan struct{}
	syncer sync.WaitGroup
}

// Open takes up the log in a directory, or begins one. Files that can't be
// read are set aside; only a directory that can't be used is an error.
func Open(p Params) (*Log, error) {
	if p.SegmentBytes == 0 {
		p.SegmentBytes = DefaultSegmentBytes
	}
	if p.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("open events: read boot id: %w", err)
		}
		p.BootID = strings.TrimSpace(string(b))
	}
	l := &Log{p: p, changed: make(chan struct{}), dirty: make(chan struct{}, 1), done: make(chan struct{})}
	whole, err := l.load()
	if err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	c, err := readCursor(p.Dir)
	if err != nil {
		l.p.Log.Warn("cursor of events can't be read", slog.Any("error", err))
	}
	// After a loss of power the files may lack their end, and numbers that a
	// reader has seen must not be given out again.
	if !whole || !c.Clean && (c.BootID != p.BootID || len(l.segments) == 0) {
		l.last = max(l.last, c.Reserved)
	}
	l.last = max(l.last, c.Last)
	l.reserve()
	l.syncer.Go(l.syncLoop)
	return l, nil
}

// Append numbers e, keeps it and tells the readers. A zero time is now.
func (l *Log) Append(e sandbox.Event) sandbox.Event {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Message = clip(e.Message)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last+1 > l.reserved && !l.closed {
		l.reserve()
	}
	l.last++
	e.Sequence = l.last
	l.pending = append(l.pending, e)
	if !l.closed {
		l.flush()
	}
	if extra := len(l.pending) - maxPending; extra > 0 {
		l.pending = append([]sandbox.Event(nil), l.pending[extra:]...)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	l.wake()
	return e
}

// Last returns the sequence of the latest event, 0 when there was none ever.
func (l *Log) Last() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Close makes everything durable and ends the readers.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.done)
	l.flush()
	lost := len(l.pending)
	last := l.last
	segments := l.segments
	l.mu.Unlock()

	l.syncer.Wait()
	var errs []error
	if lost > 0 {
		errs = append(errs, fmt.Errorf("%d events could not be written", lost))
	}
	for i, s := range segments {
		if i == len(segments)-1 {
			errs = append(errs, s.file.Sync())
		}
		errs = append(errs, s.file.Close())
	}
	if errors.Join(errs...) == nil {
		errs = append(errs, writeCursor(l.p.Dir, cursor{Reserved: last, Last: last, BootID: l.p.BootID, Clean: true}))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close events: %w", err)
	}
	return nil
}

// flush writes what is pending, as far as that works. l.mu is held.
func (l *Log) flush() {
	for len(l.pending) > 0 {
		if err := l.write(l.pending[0]); err != nil {
			if !l.failing {
				l.p.Log.Warn("events can't be written, keeping them in memory", slog.Any("error", err))
			}
			l.failing = true
			return
		}
		l.pending = l.pending[1:]
	}
	if l.failing {
		l.p.Log.Info("events can be written again")
	}
	l.failing = false
	l.pending = nil
}

// reserve sets numbers aside. l.mu is held, or nobody else has l yet.
func (l *Log) reserve() {
	next := l.last + reserve
	if err := writeCursor(l.p.Dir, cursor{Reserved: next, Last: l.last, BootID: l.p.BootID}); err != nil {
		// Only a loss of power before the next one could make numbers repeat.
		l.p.Log.Warn("numbers of events can't be set aside", slog.Any("error", err))
		next = l.last + reserve/64 // then try again
	}
	l.reserved = next
}

func (l *Log) wake() {
	select {
	case l.dirty <- struct{}{}:
	default: // it knows already
	}
}

// syncLoop makes events durable, and tries again to write what could not be
// written, until Close.
func (l *Log) syncLoop() {
	tick := time.NewTimer(syncEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.done:
			return
		case <-l.dirty:
		}
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			return
		}
		l.flush()
		again := len(l.pending) > 0
		var file *os.File
		if n := len(l.segments); n > 0 {
			file = l.segments[n-1].file
		}
		l.mu.Unlock()
		if file != nil {
			// A segment may have been dropped meanwhile: then it is closed.
			if err := file.Sync(); err != nil && !errors.Is(err, os.ErrClosed) {
				l.p.Log.Warn("events can't be made durable", slog.Any("error", err))
			}
		}
		if again {
			l.wake()
		}
		tick.Reset(syncEvery)
		select {
		case <-l.done:
			return
		case <-tick.C:
		}
	}
}

// errClosed is what readers get when the log was closed.
func errClosed() error { return fault.New(fault.Unavailable, "hutchd is stopping") }

// clip cuts a message to maxMessage bytes at the border of a character.
func clip(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	s = s[:maxMessage]
	for len(s) > 0 {
		if r, n := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || n > 1 {
			break
		}
		s = s[:len(s)-1]
	}
	return s + "..."
}
