package guestconn

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	guestv1 "github.com/hutch-run/hutch/gen/hutch/guest/v1"
)

// slowGuest is a guest that takes its time, on a clock that is not real.
type slowGuest struct {
	ahead     time.Duration
	in, out   []time.Duration // on the way in and out, by call; the last one stays
	calls     int
	corrected int
	forced    bool
}

func (g *slowGuest) Call(_ context.Context, _ string, request []byte) ([]byte, error) {
	var m guestv1.ClockRequest
	if err := proto.Unmarshal(request, &m); err != nil {
		return nil, err
	}
	<-time.After(g.in[min(g.calls, len(g.in)-1)])
	now := time.Now().Add(g.ahead)
	if m.GetAheadNanos() != 0 {
		g.ahead -= time.Duration(m.GetAheadNanos())
		g.corrected, g.forced = g.corrected+1, m.GetForced()
	}
	<-time.After(g.out[min(g.calls, len(g.out)-1)])
	g.calls++
	return proto.Marshal(&guestv1.ClockResponse{UnixNanos: now.UnixNano()})
}

func TestClocksAreMeasured(t *testing.T) {
	const ms = time.Millisecond
	for what, c := range map[string]struct {
		guest       slowGuest
		forced      bool
		most        time.Duration // off at the end
		calls       int
		corrections int
	}{
		"quick":                  {slowGuest{ahead: -5 * time.Minute, in: []time.Duration{2 * ms}, out: []time.Duration{2 * ms}}, true, ms, 2, 1},
		"slow at first":          {slowGuest{ahead: -time.Hour, in: []time.Duration{300 * ms, 3 * ms}, out: []time.Duration{ms}}, true, 2 * ms, 3, 1},
		"ever slower on one way": {slowGuest{ahead: time.Hour, in: []time.Duration{90 * ms, 30 * ms, 20 * ms, 16 * ms, 18 * ms}, out: []time.Duration{0}}, true, 8 * ms, 6, 1},
		"right already":          {slowGuest{ahead: 4 * ms, in: []time.Duration{ms}, out: []time.Duration{ms}}, true, 5 * ms, 1, 0},
		"off, and seen":          {slowGuest{ahead: 60 * ms, in: []time.Duration{ms}, out: []time.Duration{ms}}, false, 60 * ms, 1, 0},
		"far off, and seen":      {slowGuest{ahead: 160 * ms, in: []time.Duration{ms}, out: []time.Duration{ms}}, false, ms, 2, 1},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := c.guest
				if err := setClock(t.Context(), &g, c.forced); err != nil {
					t.Fatal(err)
				}
				if g.ahead.Abs() > c.most || g.calls != c.calls || g.corrected != c.corrections || g.corrected > 0 && g.forced != c.forced {
					t.Errorf("ahead by %v after %d calls, corrected %d times, forced %v", g.ahead, g.calls, g.corrected, g.forced)
				}
			})
		})
	}
}
