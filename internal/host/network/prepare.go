package network

import (
	"context"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// Prepare says how many slots to keep ready with the default policy. It
// returns at once; they are built in the background.
func (n *Network) Prepare(count int) {
	n.wantMu.Lock()
	n.want = max(0, count)
	n.wantMu.Unlock()
	n.refill()
}

func (n *Network) refill() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// prepareAgain is how long to wait after a slot could not be prepared.
const prepareAgain = 5 * time.Second

// keepPrepared builds slots ahead until ctx ends.
func (n *Network) keepPrepared(ctx context.Context) {
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-again.C:
		}
		for ctx.Err() == nil && n.lacking() {
			if _, err := n.acquireNew(ctx, defaultPolicy(), prepared); err != nil {
				if ctx.Err() == nil && !fault.Is(err, fault.Exhausted) {
					n.log.Warn("preparing a network slot did not work, trying again later", "error", err)
				}
				again.Reset(prepareAgain)
				break
			}
		}
	}
}

func (n *Network) lacking() bool {
	n.wantMu.Lock()
	defer n.wantMu.Unlock()
	return n.ledger.count(prepared) < n.want
}
