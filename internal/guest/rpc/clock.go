package rpc

import (
	"context"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/clock"
)

// Watch is a clock that can be read and corrected; a *clock.Clock.
type Watch interface {
	Now() time.Time
	Correct(offset time.Duration, forced bool) (clock.Result, error)
}

// Numbers of fields.
const (
	fieldAhead  = 1
	fieldForced = 2
	fieldNow    = 1
)

// ReadClock returns the answer to the link's call link.CallClock. See Configure
// for how it reads and writes.
func ReadClock(w Watch) func(context.Context, []byte, func([]byte) error) error {
	return func(_ context.Context, request []byte, send func([]byte) error) error {
		now := w.Now()
		var ahead time.Duration
		forced := false
		err := walk(request, func(f field) error {
			switch f.number {
			case fieldAhead:
				ahead = time.Duration(int64(f.varint))
			case fieldForced:
				forced = f.varint != 0
			}
			return nil
		})
		if err != nil {
			return fault.New(fault.Invalid, "read ClockRequest: %w", err)
		}
		if ahead != 0 {
			if _, err := w.Correct(ahead, forced); err != nil {
				return err
			}
		}
		return send(protowire.AppendVarint(protowire.AppendTag(nil, fieldNow, protowire.VarintType), uint64(now.UnixNano())))
	}
}
