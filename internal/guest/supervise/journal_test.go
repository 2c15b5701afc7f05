package supervise

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestRing(t *testing.T) {
	r := ring{max: 10}
	r.write([]byte("one\ntwo\n"))
	for n, want := range map[int]string{0: "one\ntwo\n", 1: "two\n", 2: "one\ntwo\n", 9: "one\ntwo\n"} {
		if data, after, lost := r.read(r.lines(n), 100); string(data) != want || after != 8 || lost != 0 {
			t.Errorf("last %d: %q, %d, %d", n, data, after, lost)
		}
	}
	r.write([]byte("three\nfour\nfi"))
	if data, _, _ := r.read(r.lines(0), 100); string(data) != "four\nfi" {
		t.Errorf("all that is kept: %q", data)
	}
	if data, _, _ := r.read(r.lines(1), 100); string(data) != "fi" {
		t.Errorf("an unfinished line: %q", data)
	}
	data, after, lost := r.read(0, 100)
	if string(data) != "four\nfi" || after != 21 || int(lost)+len(data) != 21 {
		t.Errorf("from the beginning: %q, %d, lost %d", data, after, lost)
	}
	if data, after, _ := r.read(r.lines(0), 6); string(data) != "four\n" || after != 19 {
		t.Errorf("a piece: %q, %d", data, after)
	}
	if data, _, _ := (&ring{max: 10}).read(0, 5); len(data) != 0 {
		t.Errorf("nothing: %q", data)
	}
}

// TestALogIsFollowed reads what comes while it is read, until the caller goes.
func TestALogIsFollowed(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	define(t, s, shell("a", chatty))
	st := begin(t, s, "a")
	var got strings.Builder
	enough := errors.New("enough")
	err := s.Follow(testenv.Context(t), "a", 0, true, func(c Chunk) error {
		got.Write(c.Data)
		switch strings.Count(got.String(), "\n") {
		case 1:
			hear(t, s, st, 1)
		case 2:
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || got.String() != "up\nheard\n" {
		t.Errorf("%v, %q", err, got.String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = s.Follow(ctx, "a", 1, true, func(c Chunk) error {
		if string(c.Data) != "heard\n" {
			t.Errorf("the last line is %q", c.Data)
		}
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that went: %v", err)
	}
	if err := s.Follow(t.Context(), "none", 0, false, nil); !fault.Is(err, fault.NotFound) {
		t.Errorf("no such log: %v", err)
	}
	stop(t, s, "a", 0)
}

// TestAFloodOfLinesIsBounded writes far more than is kept.
func TestAFloodOfLinesIsBounded(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	const lines = 60000
	define(t, s, shell("a", fmt.Sprintf("seq %d; echo; %s", lines, stays)))
	begin(t, s, "a")
	last := fmt.Sprintf("%d\n\n", lines)
	awaitLog(t, s, "a", func(log string) bool { return strings.HasSuffix(log, last) })
	if log := logOf(t, s, "a"); len(log) > keptLog || len(log) < keptLog/2 {
		t.Errorf("%d bytes are kept", len(log))
	}
	stop(t, s, "a", 0)
}
