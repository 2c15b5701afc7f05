// Package delay waits for a time to pass, and for nothing longer than a context
// lasts.
//
// It owns For alone; timers that are set again stay with whoever sets them. It
// has no state. Tested by itself.
package delay

import (
	"context"
	"time"
)

// For waits for d, not at all if that is no time, and returns nil; or the cause
// of ctx's end when that comes first.
func For(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
