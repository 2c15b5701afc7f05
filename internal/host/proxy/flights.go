package proxy

import (
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// flights counts what is in flight, and bounds it per sandbox.
type flights struct {
	limit int
	meter Meter

	mu     sync.Mutex
	of     map[sandbox.ID]int // guarded by mu; holds no zeros
	closed bool               // guarded by mu
	all    sync.WaitGroup     // Add is guarded by mu
}

func newFlights(limit int, meter Meter) *flights {
	return &flights{limit: limit, meter: meter, of: map[sandbox.ID]int{}}
}

// enter takes one place of id. leave gives it back, once.
func (f *flights) enter(id sandbox.ID) (leave func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, fault.New(fault.Unavailable, "hutchd is stopping")
	}
	if f.of[id] >= f.limit {
		return nil, fault.New(fault.Exhausted, "sandbox %s has %d proxied connections, the most allowed; end some first", id, f.limit)
	}
	f.of[id]++
	f.all.Add(1)
	if f.meter != nil {
		f.meter.ProxyStarted()
	}
	return sync.OnceFunc(func() { f.leave(id) }), nil
}

func (f *flights) leave(id sandbox.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of[id]--; f.of[id] == 0 {
		delete(f.of, id)
	}
	if f.meter != nil {
		f.meter.ProxyEnded()
	}
	f.all.Done()
}

// close lets nobody in any more and waits until all have left.
func (f *flights) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.all.Wait()
}
