package lifecycle

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// What a timeout could not do is tried again after retryTimeout, and twice as
// long after each further time, up to retryTimeoutMost.
const (
	retryTimeout     = 30 * time.Second
	retryTimeoutMost = 10 * time.Minute
)

// backOff spaces attempts out. The zero value lets the first one happen.
type backOff struct {
	wait  time.Duration
	until time.Time
}

// failed puts off the next attempt, and returns for how long.
func (o *backOff) failed() time.Duration {
	o.wait = min(max(2*o.wait, retryTimeout), retryTimeoutMost)
	o.until = time.Now().Add(o.wait)
	return o.wait
}

// timeUp does what the spec says of a sandbox that has been inactive for too
// long. When that does not work out, the sandbox stays as it is for a while.
func (b *box) timeUp() {
	reason := fmt.Sprintf("inactive for %s", b.rec.Spec.Timeout)
	var err error
	switch b.rec.Spec.OnTimeout {
	case sandbox.PauseOnTimeout:
		err = b.pause(sandbox.ByTTL, reason)
	case sandbox.HibernateOnTimeout:
		err = b.hibernate(sandbox.ByTTL, reason)
	case sandbox.DestroyOnTimeout:
		b.askDestroy(sandbox.ByTTL, reason)
		return
	}
	if err == nil {
		b.backOff = backOff{}
		return
	}
	b.putOff(reason, err)
}

// putOff is for a timeout that failed. One that something else came before did
// not.
func (b *box) putOff(reason string, err error) {
	ended := false
	select {
	case <-b.vm.Done():
		ended = true
	default:
	}
	if at, due := b.deadline(); !due || time.Now().Before(at) || ended || b.life.Err() != nil {
		b.log.Debug("timeout was interrupted", slog.Any("error", err))
		return
	}
	wait := b.backOff.failed()
	b.log.Warn("inactive sandbox stays, will try again", slog.Duration("after", wait), slog.Any("error", err))
	// No error: the change need not be written.
	_ = b.commit(change{to: b.rec.State, cause: sandbox.ByTTL, reason: reasonOf(fmt.Errorf("%s, will try again in %s: %w", reason, wait, err))})
}
