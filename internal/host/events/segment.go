package events

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/sandbox"
)

const (
	formatVersion = 1

	segmentPrefix = "events-"
	segmentSuffix = ".jsonl"
	asidePrefix   = "unread-"
	cursorName    = "cursor.json"
	cursorTemp    = ".cursor.json.new"

	// maxLine is the longest line that is read, in bytes. None that is written
	// comes near it.
	maxLine = 64 << 10
	// markEvery is how many events lie between two marks.
	markEvery = 64
)

// segment is one file of events. What is below size never changes.
type segment struct {
	first int64 // no event in it has a lower sequence
	path  string
	file  *os.File
	size  int64
	count int
	marks []mark // every markEvery-th event
}

// mark is where an event begins.
type mark struct{ sequence, offset int64 }

type header struct {
	Version int   `json:"hutch_events"`
	First   int64 `json:"first"`
}

// cursor is what survives a loss of power.
type cursor struct {
	Version int `json:"version"`
	// Reserved is the highest sequence that may have been given out.
	Reserved int64 `json:"reserved"`
	// Last is the highest sequence that was given out when this was written.
	Last   int64  `json:"last"`
	BootID string `json:"boot_id"`
	// Clean tells that the log was closed in order: Last is the last.
	Clean bool `json:"clean"`
}

// maxHeader is more than a header has, in bytes.
const maxHeader = 100

// load opens the segments of the directory. whole tells that every one could
// be read.
func (l *Log) load() (whole bool, err error) {
	entries, err := os.ReadDir(l.p.Dir)
	if err != nil {
		return false, err
	}
	whole = true
	for _, e := range entries { // sorted by name, so by sequence
		if !strings.HasPrefix(e.Name(), segmentPrefix) || !strings.HasSuffix(e.Name(), segmentSuffix) {
			continue
		}
		path := filepath.Join(l.p.Dir, e.Name())
		s, last, err := openSegment(path)
		if errors.Is(err, errUnborn) && len(l.segments) > 0 && e.Name() == segmentName(l.last+1) {
			if err := os.Remove(path); err != nil {
				return false, err
			}
			continue
		}
		if err != nil {
			whole = false
			l.p.Log.Warn("file of events can't be read, setting it aside", slog.String("path", path), slog.Any("error", err))
			if err := os.Rename(path, filepath.Join(l.p.Dir, asidePrefix+e.Name())); err != nil {
				return false, err
			}
			continue
		}
		l.segments = append(l.segments, s)
		l.last = max(l.last, last)
	}
	l.drop()
	return whole, nil
}

// errUnborn is a segment without a whole header. Where the one before ends just
// before it, its writer was killed before the first event. (After a loss of
// power it may have had events; then the cursor tells.)
var errUnborn = errors.New("the segment has no header yet")

// openSegment opens and reads a segment, and cuts off a torn end.
func openSegment(path string) (s *segment, last int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	s = &segment{path: path, file: f}
	lines := bufio.NewReaderSize(io.NewSectionReader(f, 0, info.Size()), maxLine)
	line, err := lines.ReadSlice('\n')
	if errors.Is(err, io.EOF) && len(line) < maxHeader {
		return nil, 0, errUnborn
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read header: %w", err)
	}
	var h header
	if err := json.Unmarshal(line, &h); err != nil {
		return nil, 0, fmt.Errorf("parse header: %w", err)
	}
	if h.Version != formatVersion || h.First < 1 {
		return nil, 0, fmt.Errorf("it has version %d and begins at %d, this hutchd reads version %d", h.Version, h.First, formatVersion)
	}
	s.first, s.size, last = h.First, int64(len(line)), h.First-1
	err = eachLine(lines, s.size, func(e sandbox.Event, at, end int64) bool {
		if e.Sequence > last {
			s.note(e.Sequence, at)
			last, s.size = e.Sequence, end
		}
		return true
	})
	if err != nil {
		return nil, 0, err
	}
	if s.size < info.Size() {
		if err := f.Truncate(s.size); err != nil {
			return nil, 0, fmt.Errorf("cut off torn end: %w", err)
		}
	}
	return s, last, nil
}

// eachLine calls fn with every event that can be read, and where its line
// begins and ends, until fn says no. at is the offset where lines begins.
// Lines that hold no event, and an end without a line break, are skipped.
func eachLine(lines *bufio.Reader, at int64, fn func(e sandbox.Event, at, end int64) bool) error {
	for {
		line, err := lines.ReadSlice('\n')
		end := at + int64(len(line))
		switch {
		case errors.Is(err, bufio.ErrBufferFull): // no line of ours
			at = end
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read events: %w", err)
		}
		var e sandbox.Event
		if json.Unmarshal(line, &e) == nil && e.Sequence > 0 && !fn(e, at, end) {
			return nil
		}
		at = end
	}
}

// note remembers where an event begins, if it is its turn.
func (s *segment) note(sequence, offset int64) {
	if s.count%markEvery == 0 {
		s.marks = append(s.marks, mark{sequence, offset})
	}
	s.count++
}

// read calls fn with the events of a segment that come after a sequence.
func (s *segment) read(after int64, fn func(sandbox.Event) bool) error {
	at := int64(0) // the header is no event and is skipped
	i, _ := slices.BinarySearchFunc(s.marks, after+1, func(m mark, want int64) int {
		return cmp.Compare(m.sequence, want)
	})
	if i < len(s.marks) && s.marks[i].sequence == after+1 {
		at = s.marks[i].offset
	} else if i > 0 {
		at = s.marks[i-1].offset
	}
	lines := bufio.NewReaderSize(io.NewSectionReader(s.file, at, s.size-at), maxLine)
	return eachLine(lines, at, func(e sandbox.Event, _, _ int64) bool {
		return e.Sequence <= after || fn(e)
	})
}

// write adds one event to the last segment, and begins a new one when that is
// full. On error nothing was added. l.mu is held.
func (l *Log) write(e sandbox.Event) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	line = append(line, '\n')
	n := len(l.segments)
	if n == 0 || l.segments[n-1].count > 0 && l.segments[n-1].size+int64(len(line)) > l.p.SegmentBytes {
		if err := l.begin(e.Sequence); err != nil {
			return err
		}
		n = len(l.segments)
	}
	s := l.segments[n-1]
	// At a place of our own choice: a write that was cut short by a full disk
	// is written over by the next one.
	if _, err := s.file.WriteAt(line, s.size); err != nil {
		return errors.Join(err, s.file.Truncate(s.size))
	}
	s.note(e.Sequence, s.size)
	s.size += int64(len(line))
	return nil
}

// begin makes a new segment the last one. l.mu is held.
func (l *Log) begin(first int64) (err error) {
	path := filepath.Join(l.p.Dir, segmentName(first))
	// A file of that name can only be what a crash left before its first event.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	line := []byte(`{"hutch_events":` + strconv.Itoa(formatVersion) + `,"first":` + strconv.FormatInt(first, 10) + "}\n")
	if _, err := f.Write(line); err != nil {
		return errors.Join(err, f.Close(), os.Remove(path))
	}
	l.segments = append(l.segments, &segment{first: first, path: path, file: f, size: int64(len(line))})
	l.drop()
	return nil
}

// segmentName is the name of the segment whose first event has that number.
func segmentName(first int64) string {
	return fmt.Sprintf("%s%020d%s", segmentPrefix, first, segmentSuffix)
}

// drop removes the oldest segments until there are not too many.
func (l *Log) drop() {
	for len(l.segments) > keepSegments {
		s := l.segments[0]
		l.segments = l.segments[1:]
		if err := errors.Join(s.file.Close(), os.Remove(s.path)); err != nil {
			l.p.Log.Warn("old file of events can't be removed", slog.String("path", s.path), slog.Any("error", err))
		}
	}
}

func readCursor(dir string) (cursor, error) {
	var c cursor
	b, err := os.ReadFile(filepath.Join(dir, cursorName))
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&c); err != nil {
		return cursor{}, err
	}
	return c, nil
}

// writeCursor replaces the cursor, durably.
func writeCursor(dir string, c cursor) error {
	c.Version = formatVersion
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, cursorTemp)
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, filepath.Join(dir, cursorName)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
