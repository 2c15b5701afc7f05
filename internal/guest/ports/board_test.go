package ports

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/testenv"
)

// patience bounds what a test waits for.
const patience = 20 * time.Second

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// hand is a Source that does what the test says.
type hand struct{ sink chan *Sink }

func newHand() hand { return hand{make(chan *Sink, 1)} }

func (h hand) Run(ctx context.Context, to *Sink) {
	h.sink <- to
	<-ctx.Done()
}

func one(id string, port uint16) Owner {
	return Owner{ID: id, Bindings: []Binding{{ContainerPort: 80, HostPort: port, Protocol: "tcp"}}}
}

// next returns the next event of w, short: "+web:8080", "-web", "=".
func next(t *testing.T, w *Watch) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	e, err := w.Next(ctx)
	if err != nil {
		t.Fatalf("next event: %v", err)
	}
	return short(e)
}

func short(e Event) string {
	switch e.Kind {
	case Changed:
		s := "+" + e.Owner.ID
		for _, b := range e.Owner.Bindings {
			s += fmt.Sprintf(":%d", b.HostPort)
		}
		return s
	case Removed:
		return "-" + e.Owner.ID
	case Synced:
		return "="
	}
	return "?"
}

func expect(t *testing.T, w *Watch, want ...string) {
	t.Helper()
	var got []string
	for range want {
		got = append(got, next(t, w))
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("events (-want +got):\n%s", d)
	}
}

func silent(t *testing.T, w *Watch) {
	t.Helper()
	if e, ok := w.take(); ok {
		t.Fatalf("an event that nobody expects: %s", short(e))
	}
}

func TestWatchIsToldAllThenThatThisWasAllThenChanges(t *testing.T) {
	testenv.CheckGoroutines(t)
	b, h := New(quiet()), newHand()
	defer b.Close()
	b.Start("h", h)
	s := <-h.sink
	s.Replace([]Owner{one("a", 1), one("b", 2)})

	w := b.Watch()
	defer w.Close()
	expect(t, w, "+a:1", "+b:2", "=")
	silent(t, w)
	s.Set(one("a", 1)) // nothing new
	silent(t, w)
	s.Set(one("a", 3))
	s.Remove("b")
	s.Remove("never heard of")
	expect(t, w, "+a:3", "-b")
	s.Replace([]Owner{one("c", 4)})
	expect(t, w, "-a", "+c:4")
	silent(t, w)

	again := b.Watch()
	defer again.Close()
	expect(t, again, "+c:4", "=")
	b.Stop("h")
	expect(t, again, "-c")
	expect(t, w, "-c")
}

// TestSyncedWaitsForSources: that nothing is there is known only once a source
// has looked.
func TestSyncedWaitsForSources(t *testing.T) {
	testenv.CheckGoroutines(t)
	b, h := New(quiet()), newHand()
	defer b.Close()
	b.Start("h", h)
	s := <-h.sink
	w := b.Watch()
	defer w.Close()
	silent(t, w)
	s.Set(one("a", 1))
	expect(t, w, "+a:1")
	silent(t, w)
	s.Replace([]Owner{one("a", 1), one("b", 2)})
	expect(t, w, "+b:2", "=")
}

// TestSlowWatchIsToldTheLatestOnly and holds no more than what there is to tell.
func TestSlowWatchIsToldTheLatestOnly(t *testing.T) {
	b, h := New(quiet()), newHand()
	defer b.Close()
	b.Start("h", h)
	s := <-h.sink
	s.Settle()
	w := b.Watch()
	defer w.Close()
	expect(t, w, "=")
	s.Set(one("stays", 1))
	expect(t, w, "+stays:1")
	for i := range uint16(10000) {
		s.Set(one("flaps", i+1))
		id := fmt.Sprint("passes", i)
		s.Set(one(id, i+1))
		s.Remove(id)
	}
	s.Remove("stays")
	if n := len(w.pending); n != 2 {
		t.Errorf("%d events are held for a slow reader, want 2", n)
	}
	expect(t, w, "+flaps:10000", "-stays")
	silent(t, w)
}

func TestSequenceRises(t *testing.T) {
	b, h := New(quiet()), newHand()
	defer b.Close()
	b.Start("h", h)
	s := <-h.sink
	s.Settle()
	w := b.Watch()
	defer w.Close()
	last := uint64(0)
	expect(t, w, "=")
	for i := range uint16(50) {
		s.Set(one("a", i+1))
		s.Set(one("b", i+1))
		if i%2 == 0 {
			s.Remove("b")
		}
		for e, ok := w.take(); ok; e, ok = w.take() {
			if e.Sequence <= last {
				t.Fatalf("event %s has sequence %d after %d", short(e), e.Sequence, last)
			}
			last = e.Sequence
		}
	}
}

func TestBoardIsBounded(t *testing.T) {
	b, h := New(quiet()), newHand()
	defer b.Close()
	b.Start("h", h)
	s := <-h.sink
	for i := range MaxOwners + 10 {
		s.Set(one(fmt.Sprint(i), 1))
	}
	many := one("0", 1)
	for range MaxBindings + 10 {
		many.Bindings = append(many.Bindings, many.Bindings[0])
	}
	s.Set(many)
	if len(b.owners) != MaxOwners || len(b.owners["0"].Bindings) != MaxBindings {
		t.Errorf("%d owners, %d bindings of the first", len(b.owners), len(b.owners["0"].Bindings))
	}
}

func TestNothingHappensBeforeASourceIsStarted(t *testing.T) {
	testenv.CheckGoroutines(t)
	b := New(quiet())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- b.AwaitStart(ctx) }()
	select {
	case <-done:
		t.Fatal("a board without a source has started")
	default:
	}
	h := newHand()
	b.Start("h", h)
	if err := <-done; err != nil {
		t.Error(err)
	}
	cancel()
	b.Close()
}
