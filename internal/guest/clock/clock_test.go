package clock

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// pretend is a kernel without a machine.
type pretend struct {
	now  time.Time
	err  error
	slew []time.Duration
	step []time.Time
	kept []time.Time
}

func (p *pretend) Keep(t time.Time) { p.kept = append(p.kept, t) }

func (p *pretend) Now() time.Time { return p.now }

func (p *pretend) Slew(d time.Duration) error {
	p.slew = append(p.slew, d)
	return p.err
}

func (p *pretend) Step(t time.Time) error {
	p.step = append(p.step, t)
	if p.err == nil {
		p.now = t
	}
	return p.err
}

var quiet = slog.New(slog.DiscardHandler)

const second = 1_900_000_000 // an instant in 2030, Unix seconds

func TestExactTimes(t *testing.T) {
	host := HostTime{Secs: second, Nanos: 250_000_000, Exact: true}
	for _, tc := range []struct {
		offset time.Duration
		want   Action
	}{
		{0, None},
		{99 * time.Millisecond, None},
		{100*time.Millisecond - 1, None},
		{100 * time.Millisecond, Slewed},
		{500 * time.Millisecond, Slewed},
		{time.Second - 1, Slewed},
		{time.Second, Stepped},
		{24 * time.Hour, Stepped},
		{20 * 365 * 24 * time.Hour, Stepped},
	} {
		for _, offset := range []time.Duration{tc.offset, -tc.offset} {
			k := &pretend{now: time.Unix(second, 250_000_000).Add(offset)}
			got, err := New(k, quiet).Sync(host)
			if err != nil {
				t.Fatalf("%v: %v", offset, err)
			}
			if diff := cmp.Diff(Result{Action: tc.want, Offset: offset}, got); diff != "" {
				t.Errorf("offset %v (-want +got):\n%s", offset, diff)
			}
			var slew []time.Duration
			if tc.want == Slewed {
				slew = []time.Duration{-offset}
			}
			if diff := cmp.Diff(slew, k.slew); diff != "" {
				t.Errorf("offset %v, slews (-want +got):\n%s", offset, diff)
			}
			var step []time.Time
			if tc.want == Stepped {
				step = []time.Time{time.Unix(second, 250_000_000)}
			}
			if diff := cmp.Diff(step, k.step); diff != "" {
				t.Errorf("offset %v, steps (-want +got):\n%s", offset, diff)
			}
		}
	}
}

// TestForce is about a guest in which nobody sees the clock jump.
func TestForce(t *testing.T) {
	told := time.Unix(second, 250_000_000)
	for _, tc := range []struct {
		host   HostTime
		offset time.Duration
		want   Action
	}{
		{HostTime{Secs: second, Nanos: 250_000_000, Exact: true}, 5*time.Millisecond - 1, None},
		{HostTime{Secs: second, Nanos: 250_000_000, Exact: true}, 5 * time.Millisecond, Stepped},
		{HostTime{Secs: second, Nanos: 250_000_000, Exact: true}, 500 * time.Millisecond, Stepped},
		{HostTime{Secs: second, Nanos: 250_000_000, Exact: true}, time.Hour, Stepped},
		{HostTime{Secs: second}, 200 * time.Millisecond, None}, // a guess
		{HostTime{}, time.Hour, None},
	} {
		for _, offset := range []time.Duration{tc.offset, -tc.offset} {
			k := &pretend{now: told.Add(offset)}
			got, err := New(k, quiet).Force(tc.host)
			if err != nil || got.Action != tc.want || len(k.slew) != 0 {
				t.Errorf("%+v, offset %v: %v, %v, slews %v", tc.host, offset, got, err, k.slew)
			}
			if tc.want == Stepped && !k.now.Equal(told) {
				t.Errorf("offset %v: stepped to %v", offset, k.now)
			}
		}
	}
}

// TestWholeSeconds walks a guest clock past a host that says only second.
func TestWholeSeconds(t *testing.T) {
	for _, tc := range []struct {
		name  string
		guest time.Duration // after the start of the host's second
		want  Action
	}{
		{"same instant", 0, None},
		{"expected value", 500 * time.Millisecond, None},
		{"last instant of the second", time.Second - 1, None},
		{"a second ahead of the expected value", 1500 * time.Millisecond, None},
		{"more than that", 1500*time.Millisecond + 1, Stepped},
		{"a second behind the expected value", -500 * time.Millisecond, None},
		{"more than that behind", -500*time.Millisecond - 1, Stepped},
		{"an hour ahead", time.Hour, Stepped},
		{"an hour behind", -time.Hour, Stepped},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := &pretend{now: time.Unix(second, 0).Add(tc.guest)}
			got, err := New(k, quiet).Sync(HostTime{Secs: second, Nanos: 77})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(Result{Action: tc.want, Offset: tc.guest - time.Second/2}, got); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
			if len(k.slew) != 0 {
				t.Errorf("slewed by %v on a guess", k.slew)
			}
			if tc.want == Stepped && !k.now.Equal(time.Unix(second, 500_000_000)) {
				t.Errorf("stepped to %v", k.now)
			}
		})
	}
}

// TestTruncationNeverSetsBack is the defect that whole seconds invite: a guest
// that agrees with the host, told a time without its fraction, must not move.
func TestTruncationNeverSetsBack(t *testing.T) {
	for fraction := time.Duration(0); fraction < time.Second; fraction += time.Millisecond {
		k := &pretend{now: time.Unix(second, int64(fraction))}
		if _, err := New(k, quiet).Sync(HostTime{Secs: second}); err != nil || len(k.step)+len(k.slew) != 0 {
			t.Fatalf("at %v within the second: %v, steps %v, slews %v", fraction, err, k.step, k.slew)
		}
	}
}

func TestNoTimeAndBadTimes(t *testing.T) {
	for _, tc := range []struct {
		name  string
		host  HostTime
		field string
	}{
		{"nothing told", HostTime{}, ""},
		{"nothing told, exact", FromNanos(0), ""},
		{"negative", HostTime{Secs: -1}, "timestamp_secs"},
		{"a host without a clock", HostTime{Secs: 12, Exact: true}, "timestamp_secs"},
		{"far future", HostTime{Secs: 1 << 62}, "timestamp_secs"},
		{"far past", FromNanos(-1 << 63), "timestamp_secs"},
		{"negative nanos", HostTime{Secs: second, Nanos: -1, Exact: true}, "timestamp_nanos"},
		{"more than a second of nanos", HostTime{Secs: second, Nanos: 1_000_000_000, Exact: true}, "timestamp_nanos"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := &pretend{now: time.Unix(second, 0)}
			got, err := New(k, quiet).Sync(tc.host)
			var fe *fault.Error
			if tc.field == "" && err != nil || tc.field != "" && (!errors.As(err, &fe) || fe.Field != tc.field) {
				t.Errorf("error = %v, want field %q", err, tc.field)
			}
			if got != (Result{Action: None}) || len(k.step)+len(k.slew) != 0 {
				t.Errorf("result %v, steps %v, slews %v; want the clock alone", got, k.step, k.slew)
			}
		})
	}
}

func TestFailureIsTold(t *testing.T) {
	for _, guest := range []time.Duration{time.Hour, 500 * time.Millisecond} {
		k := &pretend{now: time.Unix(second, 0).Add(guest), err: unix.EPERM}
		got, err := New(k, quiet).Sync(HostTime{Secs: second, Exact: true})
		if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "correct the clock by -") {
			t.Errorf("error = %v", err)
		}
		if diff := cmp.Diff(Result{Action: None, Offset: guest}, got); diff != "" {
			t.Errorf("result (-want +got):\n%s", diff)
		}
	}
}

func TestConcurrentSyncsStepOnce(t *testing.T) {
	k := &pretend{now: time.Unix(second, 0).Add(time.Hour)}
	c := New(k, quiet)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := c.Sync(HostTime{Secs: second, Exact: true}); err != nil {
				t.Errorf("sync: %v", err)
			}
		})
	}
	wg.Wait()
	if len(k.step) != 1 {
		t.Errorf("%d steps, want one", len(k.step))
	}
}

func TestFromNanos(t *testing.T) {
	want := HostTime{Secs: second, Nanos: 5, Exact: true}
	if diff := cmp.Diff(want, FromNanos(second*1e9+5)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRTCTime(t *testing.T) {
	zone := time.FixedZone("east", 2*3600)
	got := rtcTime(time.Date(2028, time.March, 1, 1, 59, 59, 600_000_000, zone))
	want := unix.RTCTime{Sec: 0, Min: 0, Hour: 0, Mday: 1, Mon: 2, Year: 128, Wday: 3, Yday: 60}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestSystemReads asks the real clock and changes nothing.
func TestSystemReads(t *testing.T) {
	before := time.Now()
	now := System(quiet).Now()
	if now.Before(before) || now.Sub(before) > time.Minute {
		t.Errorf("the system clock says %v at %v", now, before)
	}
}

func TestCorrect(t *testing.T) {
	for what, c := range map[string]struct {
		offset time.Duration
		forced bool
		want   Action
	}{
		"little": {4 * time.Millisecond, true, None}, "forced": {-6 * time.Millisecond, true, Stepped}, "seen": {-99 * time.Millisecond, false, None},
		"slewed": {100 * time.Millisecond, false, Slewed}, "stepped": {-time.Hour, false, Stepped},
	} {
		k := &pretend{now: time.Unix(second, 0)}
		r, err := New(k, quiet).Correct(c.offset, c.forced)
		if err != nil || r.Action != c.want || r.Offset != c.offset {
			t.Errorf("%s: %+v, %v", what, r, err)
		}
		if (len(k.kept) == 1) != (c.want == Stepped && !c.forced) {
			t.Errorf("%s: the hardware clock was set to %v", what, k.kept)
		}
		if c.want == Stepped && !k.step[0].Equal(time.Unix(second, 0).Add(-c.offset)) {
			t.Errorf("%s: stepped to %v", what, k.step[0])
		}
	}
	if _, err := New(&pretend{now: time.Unix(second, 0)}, quiet).Correct(100*365*24*time.Hour, true); !fault.Is(err, fault.Invalid) {
		t.Errorf("before the first clock: %v", err)
	}
}

func TestTheHardwareClockFollowsStepsOfAGuestThatRuns(t *testing.T) {
	for _, tc := range []struct {
		name  string
		force bool
		ahead time.Duration
		kept  int
	}{
		{"step", false, time.Hour, 1},
		{"slew", false, time.Second / 2, 0},
		{"nothing", false, 0, 0},
		{"step of a still guest", true, time.Hour, 0},
	} {
		host := HostTime{Secs: second, Exact: true}
		k := &pretend{now: time.Unix(second, 0).Add(tc.ahead)}
		sync := New(k, quiet).Sync
		if tc.force {
			sync = New(k, quiet).Force
		}
		if _, err := sync(host); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if len(k.kept) != tc.kept || (tc.kept == 1 && !k.kept[0].Equal(time.Unix(second, 0))) {
			t.Errorf("%s: the hardware clock was set to %v", tc.name, k.kept)
		}
	}
}
