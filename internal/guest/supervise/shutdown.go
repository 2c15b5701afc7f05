package supervise

import (
	"context"
	"errors"
	"slices"
	"time"
)

// Shutdown starts nothing any more, and stops all units one after the other:
// what was defined last first, so that nothing ends before those that need it.
// Each gets its share of what is left of grace, by the weight of its
// StopTimeout, and what one does not use is for those after it. With a grace
// of 0 all are killed. It returns when none runs, or when ctx ends; it may be
// called again, with less.
func (s *Supervisor) Shutdown(ctx context.Context, grace time.Duration) error {
	s.mu.Lock()
	s.ending = true
	var order []*unit
	for _, u := range slices.Backward(s.units) {
		if u.wanted() {
			order = append(order, u)
		}
	}
	s.mu.Unlock()
	deadline := time.Now().Add(grace)
	var errs []error
	for i, u := range order {
		share := shareOf(max(0, time.Until(deadline)), order[i:])
		s.p.Log.Info("stopping service", "service", u.def.Name, "within", share.Round(time.Millisecond))
		began := time.Now()
		err := u.stop(ctx, share)
		s.p.Log.Info("service stopped", "service", u.def.Name, "took", time.Since(began).Round(time.Millisecond), "error", err)
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// shareOf is what the first of the units gets of left.
func shareOf(left time.Duration, units []*unit) time.Duration {
	var all time.Duration
	for _, u := range units {
		all += u.def.StopTimeout
	}
	return time.Duration(float64(left) * float64(units[0].def.StopTimeout) / float64(all))
}

// Wanted reports whether any unit is wanted.
func (s *Supervisor) Wanted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.units, (*unit).wanted)
}
