package process

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func testHub(limit int, stall time.Duration) *hub {
	return newHub([]Stream{Stdout, Stderr}, limit, stall, &budget{max: 1 << 30})
}

// Any mix of writers, streams and readers: every reader sees each stream from
// its first byte in order, and both streams in the order of the writes.
func TestHubModel(t *testing.T) {
	testenv.CheckGoroutines(t)
	const limit = 8 << 10
	h := testHub(limit, time.Hour)
	const total = 2 << 20
	type piece struct {
		stream Stream
		data   []byte
	}
	var pieces []piece
	rnd := rand.New(rand.NewPCG(3, 4))
	for n := 0; n < total; {
		p := piece{Stream(rnd.IntN(2)), make([]byte, 1+rnd.IntN(1<<rnd.IntN(13)))}
		for i := range p.data {
			p.data[i] = byte(n + i)
		}
		n += len(p.data)
		pieces = append(pieces, p)
	}
	var want [2]bytes.Buffer
	for _, p := range pieces {
		want[p.stream].Write(p.data)
	}
	var wg sync.WaitGroup
	for i := range 4 {
		sub := h.subscribe()
		wg.Go(func() {
			defer sub.Close()
			var got [2]bytes.Buffer
			for {
				ev, err := sub.Next(testenv.Context(t), 0)
				if err != nil {
					t.Error(err)
					return
				}
				if ev.Kind == End {
					break
				}
				got[ev.Stream].Write(ev.Data)
				for range i * 50 {
					// Readers of different speed.
					_ = bytes.Count(ev.Data, []byte{1})
				}
			}
			for s := range got {
				if !bytes.Equal(got[s].Bytes(), want[s].Bytes()) {
					t.Errorf("reader %d: stream %d: %d bytes of %d, or other ones", i, s, got[s].Len(), want[s].Len())
				}
			}
		})
	}
	for _, p := range pieces {
		if !h.room(p.stream, nil) {
			t.Fatal("stopped")
		}
		h.append(p.stream, p.data)
		if used := h.budget.used.Load(); used > 2*(limit+segmentBytes+segmentCost) {
			t.Fatalf("%d bytes held", used)
		}
	}
	h.end(Exit{})
	wg.Wait()
	h.abandon()
	if used := h.budget.used.Load(); used != 0 {
		t.Errorf("%d bytes still charged", used)
	}
}

// Single bytes to alternating streams are the worst case of the log.
func TestHubChargesItsOwnCost(t *testing.T) {
	h := testHub(64<<10, time.Hour)
	for i := range 200_000 {
		h.append(Stream(i%2), []byte{byte(i)})
	}
	segments := len(h.tracks[0].segs) + len(h.tracks[1].segs)
	if segments > 2*(64<<10)/segmentCost {
		t.Errorf("%d segments are kept", segments)
	}
	sub := h.subscribe()
	h.end(Exit{})
	r, err := follow(testenv.Context(t), sub)
	got := len(r.stdout()) + len(r.stderr())
	if err != nil || uint64(got)+sub.Missed() != 200_000 || got == 0 {
		t.Errorf("%d bytes and %d missed, %v", got, sub.Missed(), err)
	}
}

func TestHubKeepsLessWhenMemoryIsShort(t *testing.T) {
	h := testHub(1<<20, time.Hour)
	h.budget.max = 100 << 10
	for range 100 {
		h.append(Stdout, make([]byte, segmentBytes))
	}
	if used := h.budget.used.Load(); used > h.budget.max+segmentBytes+segmentCost {
		t.Errorf("%d bytes are kept", used)
	}
	h.release()
	if used := h.budget.used.Load(); used != 0 {
		t.Errorf("%d bytes are kept after the release", used)
	}
}

// A reader that was up to date for longer than the stall time is not cut off
// because output comes now.
func TestHubStallCountsFromWhenThereIsSomething(t *testing.T) {
	h := testHub(1000, time.Hour)
	sub := h.subscribe()
	sub.moved = time.Now().Add(-2 * time.Hour)
	h.append(Stdout, make([]byte, 2000))
	if h.cutStalled(time.Now()) == 0 || sub.lost {
		t.Error("cut off at once")
	}
	if h.cutStalled(time.Now().Add(2*time.Hour)) != 0 || !sub.lost {
		t.Error("not cut off in time")
	}
	if _, err := sub.Next(context.Background(), 0); !fault.Is(err, fault.Exhausted) {
		t.Errorf("got %v", err)
	}
}

func TestHubRoomEndsWithTheTable(t *testing.T) {
	h := testHub(1000, time.Hour)
	sub := h.subscribe()
	h.append(Stdout, make([]byte, 2000))
	stop := make(chan struct{})
	done := make(chan bool)
	go func() { done <- h.room(Stdout, stop) }()
	close(stop)
	if <-done {
		t.Error("room where there is none")
	}
	// The other stream is not held up.
	if !h.room(Stderr, nil) {
		t.Error("stderr has to wait for stdout's reader")
	}
	// Taking makes room.
	go func() { done <- h.room(Stdout, nil) }()
	if _, err := sub.Next(context.Background(), 0); err != nil {
		t.Error(err)
	}
	if !<-done {
		t.Error("no room after the reader took it")
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("why"))
	if _, err := sub.Next(ctx, 0); err == nil || err.Error() != "why" {
		t.Errorf("got %v", err)
	}
}
