package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// writerEnv makes the test binary append events until it is killed.
const writerEnv = "HUTCH_EVENTS_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerEnv); dir != "" {
		appendForEver(dir)
	}
	os.Exit(m.Run())
}

func params(dir string) Params {
	return Params{Dir: dir, BootID: "boot-1", Log: slog.New(slog.DiscardHandler)}
}

func open(t *testing.T, p Params) *Log {
	t.Helper()
	l, err := Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func closed(t *testing.T, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// abandon ends a log as a killed process would: nothing is written any more.
func abandon(l *Log) {
	l.mu.Lock()
	l.closed = true
	close(l.done)
	for _, s := range l.segments {
		s.file.Close()
	}
	l.mu.Unlock()
	l.syncer.Wait()
}

func event(n int) sandbox.Event {
	return sandbox.Event{
		Time: time.Unix(int64(n), 0).UTC(), ID: "sb-1", State: sandbox.Running, Previous: sandbox.Pending,
		Cause: sandbox.ByUser, Message: "message " + strconv.Itoa(n),
	}
}

// all reads everything after a sequence.
func all(t *testing.T, l *Log, after int64) (events []sandbox.Event, missed int64) {
	t.Helper()
	for {
		b, err := l.Since(after)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.Events) == 0 {
			return events, missed
		}
		missed += b.Missed
		events = append(events, b.Events...)
		after = b.Events[len(b.Events)-1].Sequence
	}
}

func TestEventsSurviveReopening(t *testing.T) {
	testenv.CheckGoroutines(t)
	dir := t.TempDir()
	var want []sandbox.Event
	for round := range 3 {
		l := open(t, params(dir))
		for i := range 400 {
			e := l.Append(event(i))
			if n := int64(round*400 + i + 1); e.Sequence != n {
				t.Fatalf("event %d has sequence %d", n, e.Sequence)
			}
			want = append(want, e)
		}
		got, missed := all(t, l, 0)
		if diff := cmp.Diff(want, got); diff != "" || missed != 0 {
			t.Fatalf("missed %d, events (-want +got):\n%s", missed, diff)
		}
		for _, after := range []int64{1, 63, 64, 65, 127, 399, int64(len(want)) - 1, int64(len(want))} {
			got, _ := all(t, l, after)
			if len(got) != len(want)-int(after) || len(got) > 0 && got[0].Sequence != after+1 {
				t.Errorf("after %d: %d events", after, len(got))
			}
		}
		closed(t, l)
	}
}

func TestOldEventsAreDroppedAndCounted(t *testing.T) {
	p := params(t.TempDir())
	p.SegmentBytes = 2000
	l := open(t, p)
	const total = 500
	for i := range total {
		l.Append(event(i))
	}
	got, missed := all(t, l, 10)
	if missed == 0 || int64(len(got))+missed != total-10 {
		t.Errorf("%d events and %d missed, want %d together", len(got), missed, total-10)
	}
	entries, err := os.ReadDir(p.Dir)
	if err != nil || len(entries) != keepSegments+1 {
		t.Errorf("%d files (%v), want %d and the cursor", len(entries), err, keepSegments)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Size() > p.SegmentBytes {
			t.Errorf("%s has %d bytes (%v)", e.Name(), info.Size(), err)
		}
	}
	closed(t, l)
	if l = open(t, p); l.Last() != total {
		t.Errorf("reopened at %d, want %d", l.Last(), total)
	}
}

func TestTornAndForeignLines(t *testing.T) {
	for name, tail := range map[string]string{
		"half a line": `{"sequence":4,"ti`,
		"zeroes":      strings.Repeat("\x00", 5000),
		"garbage":     "\xff\xfe\n\n{}\n[]\n",
		"long line":   strings.Repeat("x", 3*maxLine) + "\n",
		"old event":   `{"sequence":2,"id":"sb-1","state":"gone"}` + "\n",
	} {
		p := params(t.TempDir())
		l := open(t, p)
		var want []sandbox.Event
		for i := range 3 {
			want = append(want, l.Append(event(i)))
		}
		path := l.segments[0].path
		abandon(l)
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(tail); err != nil {
			t.Fatal(err)
		}
		f.Close()
		l = open(t, p)
		want = append(want, l.Append(event(3)))
		if want[3].Sequence != 4 {
			t.Errorf("%s: next event has sequence %d, want 4", name, want[3].Sequence)
		}
		if got, _ := all(t, l, 0); !cmp.Equal(want, got) {
			t.Errorf("%s: events (-want +got):\n%s", name, cmp.Diff(want, got))
		}
		closed(t, l)
		l = open(t, p)
		if got, _ := all(t, l, 0); !cmp.Equal(want, got) {
			t.Errorf("%s: reopened: events (-want +got):\n%s", name, cmp.Diff(want, got))
		}
		closed(t, l)
	}
}

func TestUnreadableFilesAreSetAside(t *testing.T) {
	for name, content := range map[string]string{
		"newer": `{"hutch_events":2,"first":1}` + "\n",
		"empty": "", "garbage": "\x00\x01\n", "torn": `{"hutch_events":1`,
	} {
		p := params(t.TempDir())
		l := open(t, p)
		for i := range 3 {
			l.Append(event(i))
		}
		path := l.segments[0].path
		abandon(l)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		l = open(t, p)
		e := l.Append(event(9))
		if e.Sequence <= 3 {
			t.Errorf("%s: sequence went back to %d", name, e.Sequence)
		}
		b, err := os.ReadFile(filepath.Join(p.Dir, asidePrefix+filepath.Base(path)))
		if err != nil || string(b) != content {
			t.Errorf("%s: set aside: %q, %v", name, b, err)
		}
		got, missed := all(t, l, 1)
		if len(got) != 1 || missed != e.Sequence-2 {
			t.Errorf("%s: %d events, %d missed", name, len(got), missed)
		}
		closed(t, l)
	}
}

func TestSequenceNeverGoesBack(t *testing.T) {
	p := params(t.TempDir())
	l := open(t, p)
	for i := range 10 {
		l.Append(event(i))
	}
	path := l.segments[0].path
	abandon(l)

	// Killed on a host that stays up: the files are whole, numbers go on.
	l = open(t, p)
	if l.Last() != 10 {
		t.Errorf("after a kill: last is %d, want 10", l.Last())
	}
	abandon(l)

	// The host lost power, and with it the end of the file.
	p.BootID = "boot-2"
	if err := os.Truncate(path, 100); err != nil {
		t.Fatal(err)
	}
	l = open(t, p)
	if l.Last() < 10 {
		t.Errorf("after a loss of power: last is %d, want at least 10", l.Last())
	}
	before := l.Append(event(11)).Sequence
	closed(t, l)

	// Stopped in order, then the host was started anew: no gap.
	p.BootID = "boot-3"
	l = open(t, p)
	if got := l.Append(event(12)).Sequence; got != before+1 {
		t.Errorf("after a stop in order: %d, want %d", got, before+1)
	}
	closed(t, l)

	// Somebody removed the files.
	last := l.Last()
	for _, s := range l.segments {
		if err := os.Remove(s.path); err != nil {
			t.Fatal(err)
		}
	}
	l = open(t, p)
	if got := l.Append(event(13)).Sequence; got <= last {
		t.Errorf("after the files were removed: %d, want more than %d", got, last)
	}
}

func TestReadersFollow(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx := testenv.Context(t)
	p := params(t.TempDir())
	p.SegmentBytes = 64 << 10
	l := open(t, p)
	const writers, each = 4, 500
	var wg sync.WaitGroup
	for range 5 {
		r, err := l.Subscribe(0)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for at := int64(0); at < writers*each; {
				b, err := r.Next(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				at += b.Missed
				for _, e := range b.Events {
					if at++; e.Sequence != at {
						t.Errorf("event %d comes as %d", e.Sequence, at)
						return
					}
				}
			}
		})
	}
	for range writers {
		wg.Go(func() {
			for i := range each {
				l.Append(event(i))
			}
		})
	}
	wg.Wait()
}

func TestSubscribe(t *testing.T) {
	ctx := testenv.Context(t)
	l := open(t, params(t.TempDir()))
	for i := range 5 {
		l.Append(event(i))
	}
	for _, bad := range []int64{6, 1 << 60, -2} {
		if _, err := l.Subscribe(bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("subscribe after %d: %v, want invalid", bad, err)
		}
	}
	r, err := l.Subscribe(-1)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := r.Read(); err != nil || len(b.Events) != 0 {
		t.Errorf("only new ones: got %v, %v", b, err)
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.Next(done); !errors.Is(err, context.Canceled) {
		t.Errorf("next on a dead context: %v", err)
	}
	l.Append(event(5))
	if b, err := r.Next(ctx); err != nil || len(b.Events) != 1 || b.Events[0].Sequence != 6 {
		t.Errorf("got %v, %v, want event 6", b, err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := r.Next(ctx); !fault.Is(err, fault.Unavailable) {
			t.Errorf("next on a closed log: %v, want unavailable", err)
		}
	})
	closed(t, l)
	wg.Wait()
}

func TestMessagesAreBounded(t *testing.T) {
	l := open(t, params(t.TempDir()))
	e := event(1)
	e.Message = strings.Repeat("ä\x00\xff\n", 100_000)
	l.Append(e)
	got, _ := all(t, l, 0)
	if len(got) != 1 || len(got[0].Message) > 3*maxMessage {
		t.Fatalf("got %d events, message of %d bytes", len(got), len(got[0].Message))
	}
	if got, want := clip(strings.Repeat("ä", maxMessage)), strings.Repeat("ä", maxMessage/2)+"..."; got != want {
		t.Errorf("clipped to %d bytes, want %d", len(got), len(want))
	}
}

func TestFullDisk(t *testing.T) {
	dir := testenv.SmallDisk(t, "64k")
	p := params(dir)
	l := open(t, p)
	var want []sandbox.Event
	add := func(n int) {
		for range n {
			want = append(want, l.Append(event(len(want))))
		}
	}
	add(10)
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	add(200)
	if got, missed := all(t, l, 0); missed != 0 || !cmp.Equal(want, got) {
		t.Errorf("on a full disk: missed %d, events (-want +got):\n%s", missed, cmp.Diff(want, got))
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	add(1)
	closed(t, l)
	l = open(t, p)
	defer closed(t, l)
	if got, missed := all(t, l, 0); missed != 0 || !cmp.Equal(want, got) {
		t.Errorf("when there was room again: missed %d, events (-want +got):\n%s", missed, cmp.Diff(want, got))
	}
}

// appendForEver appends events and tells each sequence once it is given out.
func appendForEver(dir string) {
	p := params(dir)
	p.SegmentBytes = 20_000
	l, err := Open(p)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for {
		fmt.Println(l.Append(event(1)).Sequence)
	}
}

// TestKilledBeforeTheFirstEvent leaves what a writer leaves that is killed when
// it has just begun a segment.
func TestKilledBeforeTheFirstEvent(t *testing.T) {
	for _, header := range []string{"", `{"hutch_ev`} {
		dir := t.TempDir()
		l := open(t, params(dir))
		l.Append(event(1))
		path := filepath.Join(dir, segmentName(2))
		if err := os.WriteFile(path, []byte(header), 0o600); err != nil {
			t.Fatal(err)
		}
		next := open(t, params(dir)) // the one before is not closed: it was killed
		if got := next.Append(event(2)).Sequence; got != 2 {
			t.Errorf("header %q: the next event has number %d, want 2", header, got)
		}
		closed(t, next)
	}
}

func TestKilledWriter(t *testing.T) {
	dir := t.TempDir()
	last := int64(0)
	for round := range 10 {
		seen := 0
		testenv.KillAfter(t, writerEnv+"="+dir, func(text string) bool {
			n, err := strconv.ParseInt(text, 10, 64)
			// One more may have been written than was told.
			if err != nil || n != last+1 && (seen > 0 || n != last+2) {
				t.Errorf("round %d: %s after %d", round, text, last)
				return true
			}
			last = n
			seen++
			return seen >= 50+round*40
		})
		if t.Failed() {
			return
		}
	}
}
