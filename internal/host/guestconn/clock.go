package guestconn

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	guestv1 "github.com/hutch-run/hutch/gen/hutch/guest/v1"
	"github.com/hutch-run/hutch/internal/link"
)

// A guest's clock is read until an answer was quick, for half of that time is
// how wrong the reading may be; the first answer of an emulated guest, which
// has not run that code before, is slow.
const (
	readMost  = 5
	readQuick = 10 * time.Millisecond
)

// A difference below these is left as it is: a measurement is not much better
// than the first, and the guest leaves one below the second alone unless forced.
const (
	leaveForced = 5 * time.Millisecond
	leave       = 100 * time.Millisecond
)

// SyncClock implements Guest.
func (c *Conn) SyncClock(ctx context.Context) error {
	session, err := c.session(ctx)
	if err != nil {
		return err
	}
	return setClock(ctx, session, false)
}

// caller makes calls of the link; a *link.Session.
type caller interface {
	Call(ctx context.Context, name string, request []byte) ([]byte, error)
}

// setClock measures how far the guest's clock is from the host's, and has it
// corrected. forced says that no program sees it jump. The measurement is NTP's
// (RFC 5905, part 8), without its memory.
func setClock(ctx context.Context, session caller, forced bool) error {
	ahead, err := measureClock(ctx, session)
	if err != nil {
		return err
	}
	if d := ahead.Abs(); d < leaveForced || !forced && d < leave {
		return nil
	}
	_, _, err = callClock(ctx, session, &guestv1.ClockRequest{AheadNanos: ahead.Nanoseconds(), Forced: forced})
	return err
}

// measureClock returns how far the guest's clock is ahead.
func measureClock(ctx context.Context, session caller) (ahead time.Duration, err error) {
	shortest := time.Duration(-1)
	for range readMost {
		off, round, err := callClock(ctx, session, &guestv1.ClockRequest{})
		if err != nil {
			return 0, err
		}
		if shortest < 0 || round < shortest {
			ahead, shortest = off, round
		}
		if round <= readQuick {
			break
		}
	}
	return ahead, nil
}

// callClock makes the call, and returns how far the guest was ahead by its
// answer, and how long that took.
func callClock(ctx context.Context, session caller, m *guestv1.ClockRequest) (ahead, round time.Duration, err error) {
	request, err := proto.Marshal(m)
	if err != nil {
		return 0, 0, fmt.Errorf("ask guest for the time: %w", err)
	}
	began := time.Now()
	reply, err := session.Call(ctx, link.CallClock, request)
	round = time.Since(began)
	if err != nil {
		return 0, 0, callError("ask guest for the time", err)
	}
	var answer guestv1.ClockResponse
	if err := proto.Unmarshal(reply, &answer); err != nil {
		return 0, 0, fmt.Errorf("ask guest for the time: read its reply: %w", err)
	}
	middle := began.Add(round / 2).Round(0) // wall clock
	return time.Unix(0, answer.GetUnixNanos()).Sub(middle), round, nil
}
