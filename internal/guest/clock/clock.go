package clock

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	// ignoreBelow is what a difference must reach to be acted on. Below it,
	// delays on the link are as likely a cause as the clock.
	ignoreBelow = 100 * time.Millisecond
	// stepFrom is the difference from which slewing would take too long: the
	// kernel slews 0.5 ms a second, so that a second takes 33 minutes.
	stepFrom = time.Second
	// forceFrom is what a difference must reach to be acted on while no program
	// can see the clock jump. It is about what a message takes.
	forceFrom = 5 * time.Millisecond
)

// Times outside of this range are no answer of a clock that was ever set.
const (
	oldest = 946684800  // 2000-01-01, Unix seconds
	newest = 7258118400 // 2200-01-01, Unix seconds
)

// Action is what was done to the clock.
type Action string

// The actions, as the API names them.
const (
	None    Action = "none"
	Slewed  Action = "slewed"
	Stepped Action = "stepped"
)

// Result is the outcome of one Sync.
type Result struct {
	Action Action
	// Offset is how far the guest was from the host before the action;
	// positive when the guest was ahead. From whole seconds it is an estimate.
	Offset time.Duration
}

// HostTime is what the host said. The zero value says nothing.
type HostTime struct {
	// Secs is Unix time. 0: the host told no time.
	Secs int64
	// Nanos is the part within that second, when Exact.
	Nanos int32
	// Exact is false when the host knows whole seconds only.
	Exact bool
}

// FromNanos returns the exact time of a count of Unix nanoseconds; 0 tells no
// time.
func FromNanos(n int64) HostTime {
	if n == 0 {
		return HostTime{}
	}
	t := time.Unix(0, n)
	return HostTime{Secs: t.Unix(), Nanos: int32(t.Nanosecond()), Exact: true}
}

// Kernel is the clock itself.
type Kernel interface {
	// Now returns the wall-clock time.
	Now() time.Time
	// Slew makes the clock run faster (slower when negative) until correction
	// is made up for. It replaces a slew that is still going on.
	Slew(correction time.Duration) error
	// Step sets the clock, and ends a slew.
	Step(t time.Time) error
	// Keep sets the hardware clock, as well as it can.
	Keep(t time.Time)
}

// Clock brings the guest's clock to the host's time. Safe for concurrent use.
type Clock struct {
	kernel Kernel
	log    *slog.Logger
	mu     sync.Mutex // one reading and its action at a time
}

// New returns a Clock over the given kernel; System is the real one.
func New(k Kernel, log *slog.Logger) *Clock { return &Clock{kernel: k, log: log} }

// Sync compares the clock with the host's and acts on the difference:
//
//	below 100 ms            nothing
//	below 1 s               slew
//	from 1 s                step
//
// A time in whole seconds stands for half a second later, which is what it is
// on average; being wrong by up to half a second then, it never slews, and
// only differences above 1 s step. So a clock is never set back by the
// rounding of the message alone. A time that no clock can show is Invalid.
func (c *Clock) Sync(host HostTime) (Result, error) { return c.keep(c.sync(host, decide)) }

// keep has the hardware clock follow a step.
func (c *Clock) keep(r Result, err error) (Result, error) {
	if err == nil && r.Action == Stepped {
		c.kernel.Keep(c.kernel.Now())
	}
	return r, err
}

// Force is Sync for a guest in which no program runs: it steps from 5 ms on,
// and never slews. A time in whole seconds is treated as by Sync. It leaves the
// hardware clock alone, which went on with the host's while the guest slept.
func (c *Clock) Force(host HostTime) (Result, error) { return c.sync(host, decideForced) }

func (c *Clock) sync(host HostTime, decide func(offset time.Duration, exact bool) Result) (Result, error) {
	if host.Secs == 0 && host.Nanos == 0 {
		return Result{Action: None}, nil
	}
	told, err := host.time()
	if err != nil {
		return Result{Action: None}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// Wall clock only: a monotonic reading would hide a clock that jumped.
	return c.act(decide(c.kernel.Now().Round(0).Sub(told.Round(0)), host.Exact))
}

// Now returns the time that the guest has.
func (c *Clock) Now() time.Time { return c.kernel.Now() }

// Correct acts on an offset that the host has measured: unlike a time that is
// told, it does not get old on its way. forced is for a guest in which no
// program runs, see Force. An offset that leads to a time that no clock can
// show is Invalid.
func (c *Clock) Correct(offset time.Duration, forced bool) (Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := (HostTime{Secs: c.kernel.Now().Add(-offset).Unix()}).time(); err != nil {
		return Result{Action: None}, err
	}
	if forced {
		return c.act(decideForced(offset, true))
	}
	return c.keep(c.act(decide(offset, true)))
}

// act does what was decided, with the lock held.
func (c *Clock) act(r Result) (Result, error) {
	var err error
	switch r.Action {
	case None:
		return r, nil
	case Slewed:
		err = c.kernel.Slew(-r.Offset)
	case Stepped:
		err = c.kernel.Step(c.kernel.Now().Add(-r.Offset))
	}
	if err != nil {
		return Result{Action: None, Offset: r.Offset}, fmt.Errorf("correct the clock by %v: %w", -r.Offset, err)
	}
	c.log.Info("clock corrected", "action", string(r.Action), "offset", r.Offset)
	return r, nil
}

// time checks what the host said and returns it, whole seconds with the half
// second that is to be expected.
func (h HostTime) time() (time.Time, error) {
	if h.Secs < oldest || h.Secs >= newest {
		return time.Time{}, fault.BadField("timestamp_secs",
			"%d is not between the years 2000 and 2200; is the host's clock set?", h.Secs)
	}
	if !h.Exact {
		return time.Unix(h.Secs, int64(time.Second/2)), nil
	}
	if h.Nanos < 0 || h.Nanos >= int32(time.Second) {
		return time.Time{}, fault.BadField("timestamp_nanos", "%d is not between 0 and 999999999", h.Nanos)
	}
	return time.Unix(h.Secs, int64(h.Nanos)), nil
}

// decideForced is the rule of Force.
func decideForced(offset time.Duration, exact bool) Result {
	r := decide(offset, exact)
	if exact && r.Offset.Abs() >= forceFrom {
		r.Action = Stepped
	}
	return r
}

// decide is the whole rule, see Sync.
func decide(offset time.Duration, exact bool) Result {
	r := Result{Action: None, Offset: offset}
	switch d := offset.Abs(); {
	case !exact:
		if d > stepFrom {
			r.Action = Stepped
		}
	case d >= stepFrom:
		r.Action = Stepped
	case d >= ignoreBelow:
		r.Action = Slewed
	}
	return r
}
