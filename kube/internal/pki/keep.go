package pki

import (
	"context"
	"fmt"
	"time"
)

// Keep renews the leaves when their time comes, until ctx ends, and calls renewed after a round in which one was. It looks at the clock every
// period and not at the end of a computed time: a machine that slept for months, or was copied from an old snapshot, finds its timers
// where they were, and its certificates old. An error is told and tried again.
func (d *Dir) Keep(ctx context.Context, period time.Duration, leaves []Leaf, renewed func() error, tell func(error)) {
	t := time.NewTicker(period)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		any := false
		for _, l := range leaves {
			issued, err := d.Ensure(l)
			any = any || issued
			if err != nil {
				tell(err)
			}
		}
		if !any {
			continue
		}
		if err := renewed(); err != nil {
			tell(fmt.Errorf("after a renewal: %w", err))
		}
	}
}
