package network

import (
	"context"
	"errors"
	"testing"

	"github.com/hutch-run/hutch/internal/testenv"
)

func TestTheLedgerTurnsRoundAndPassesOverWhatIsUsed(t *testing.T) {
	l := newLedger(4, 2)
	l.setForeign(map[int]bool{4: true, 99: true})
	for i, want := range []int{3, 1, 2} {
		if got, ok := l.next(); !ok || got != want {
			t.Fatalf("search %d found %d, %t, want %d", i, got, ok, want)
		}
	}
	if got, ok := l.next(); ok {
		t.Fatalf("all are used, yet %d was found", got)
	}
	l.end(1, free)
	if freed := l.setForeign(nil); !freed {
		t.Error("nothing became free, though the foreign index did")
	}
	for _, want := range []int{4, 1} {
		if got, ok := l.next(); !ok || got != want {
			t.Fatalf("found %d, %t, want %d", got, ok, want)
		}
	}
}

func TestForeignDoesNotTakeWhatIsOurs(t *testing.T) {
	l := newLedger(3, 0)
	index, _ := l.next()
	l.end(index, taken)
	l.setForeign(map[int]bool{index: true})
	if !l.is(index, taken) {
		t.Error("a slot in use became foreign")
	}
}

func TestWhoBeginsWaitsForWhoIsAtIt(t *testing.T) {
	testenv.CheckGoroutines(t)
	l := newLedger(3, 0)
	index, _ := l.next()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.begin(ctx, index); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v while another is at it", err)
	}
	got := make(chan place)
	go func() {
		was, err := l.begin(t.Context(), index)
		if err != nil {
			t.Error(err)
		}
		got <- was
	}()
	l.end(index, taken)
	if was := <-got; was != taken {
		t.Errorf("it was %d, want taken", was)
	}
	if !l.is(index, busy) {
		t.Error("it is not busy")
	}
}

func TestPreparedSlotsComeOldestFirst(t *testing.T) {
	l := newLedger(5, 0)
	for range 3 {
		index, _ := l.next()
		l.end(index, prepared)
	}
	if was, err := l.begin(t.Context(), 2); err != nil || was != prepared || !l.is(2, prepared) {
		t.Errorf("beginning a prepared slot: %d, %v", was, err)
	}
	for want := 1; want <= 3; want++ {
		if got, ok := l.nextPrepared(); !ok || got != want {
			t.Errorf("got %d, %t, want %d", got, ok, want)
		}
	}
	if _, ok := l.nextPrepared(); ok {
		t.Error("a fourth one")
	}
}
