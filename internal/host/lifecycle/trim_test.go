package lifecycle

import (
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

func TestTrimIsDue(t *testing.T) {
	start := time.Now()
	at := func(d time.Duration) time.Time { return start.Add(d) }
	for name, c := range map[string]struct {
		trims  trims
		active time.Time
		now    time.Time
		busy   bool
		want   bool
	}{
		"used since, and a while ago":     {trims{at: at(0)}, at(time.Second), at(time.Second + trimAfter), false, true},
		"used since, a moment ago":        {trims{at: at(0)}, at(time.Second), at(trimAfter), false, false},
		"not used since":                  {trims{at: at(0)}, at(-time.Second), at(time.Hour), false, false},
		"in use":                          {trims{at: at(0)}, at(time.Second), at(trimEvery - 1), true, false},
		"in use for long":                 {trims{at: at(0)}, at(time.Second), at(trimEvery), true, true},
		"used again and again for long":   {trims{at: at(0)}, at(trimEvery - 1), at(trimEvery), false, true},
		"a guest that can't, used since":  {trims{at: at(0), never: true}, at(time.Second), at(time.Hour), false, false},
		"a guest that can't, in long use": {trims{at: at(0), never: true}, at(time.Second), at(time.Hour), true, false},
	} {
		if got := c.trims.due(c.now, c.active, c.busy); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestTrimIsNoActivity(t *testing.T) {
	h := start(t, newWorld(t))
	before := h.create("a", plain).ActiveAt
	got, err := h.Trim(h.c, "a")
	if err != nil || got.Guest != 7 || got.Host != 0 || got.Detail != "/: 7 bytes" {
		t.Fatalf("%+v, %v", got, err)
	}
	if at := h.lookup("a").lastActive(); !at.Equal(before) {
		t.Errorf("active at %v, before %v", at, before)
	}
	_, err = h.Trim(h.c, "b")
	wants(t, err, fault.NotFound)
	h.must(h.Pause(h.c, "a"))
	_, err = h.Trim(h.c, "a")
	wants(t, err, fault.Precondition)
}
