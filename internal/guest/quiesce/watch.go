package quiesce

import (
	"context"
	"time"
)

// watch begins to look for the host, anew if it did so before. The caller holds
// the turn.
func (q *Quiet) watch() {
	q.stopWatch()
	ctx, cancel := context.WithCancel(context.Background())
	q.unwatch = cancel
	q.watchers.Go(func() {
		defer cancel()
		for done := false; !done; {
			why := q.awaitLonely(ctx)
			if why == "" || q.take(ctx) != nil {
				return
			}
			done = q.wakeAlone(why)
			q.give()
		}
	})
}

// stopWatch ends the watch. The caller holds the turn, so that no watcher is
// about to act.
func (q *Quiet) stopWatch() {
	if q.unwatch != nil {
		q.unwatch()
		q.watchers.Wait()
		q.unwatch = nil
	}
}

// awaitLonely returns why the guest should wake without its host, or "" when
// ctx ended. A host that comes back starts its time anew.
func (q *Quiet) awaitLonely(ctx context.Context) string {
	tick := time.NewTicker(q.p.lookEvery) // the port tells its reader only
	defer tick.Stop()
	began := time.Now()
	var away time.Time // of the first look that found no host; zero: there is one
	for {
		select {
		case <-ctx.Done():
			return ""
		case <-tick.C:
		}
		now := time.Now()
		switch {
		case now.Sub(began) >= q.p.patience:
			return "its host did not configure it"
		case !q.p.Away():
			away = time.Time{}
		case away.IsZero():
			away = now
		case now.Sub(away) >= q.p.lonely:
			return "its host did not come back"
		}
	}
}

// wakeAlone ends the stillness without having been configured, and reports
// whether it has ended. The caller holds the turn, and is the watcher.
func (q *Quiet) wakeAlone(why string) bool {
	if !q.Still() {
		return true
	}
	if err := q.end(false); err != nil {
		q.p.Log.Error("programs stay frozen", "because", why, "err", err)
		return !q.Still()
	}
	q.p.Log.Warn("the machine was still, and goes on by itself", "because", why)
	return true
}
