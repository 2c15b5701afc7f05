package reset

import (
	"context"
	"fmt"
	"sync"
)

// endPods ends all pods side by side: each waits for its own grace.
func endPods(ctx context.Context, pods Pods, r *Result) {
	ids, err := pods.List(ctx)
	if err != nil {
		r.left("pods: %v", err)
		return
	}
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() { errs[i] = pods.End(ctx, id) })
	}
	wg.Wait()
	for i, id := range ids {
		r.tell(fmt.Sprintf("pod %.12s", id), true, errs[i])
	}
}
