package files

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// Limits of the watchers that are polled.
const (
	maxPollers    = 64
	maxPollEvents = 8192
	// pollerExpiry ends a watcher that nobody asks.
	pollerExpiry = 10 * time.Minute
)

// poller collects the changes of a watch until somebody asks for them.
type poller struct {
	uid    uint32
	watch  *Watch
	cancel context.CancelFunc

	mu     sync.Mutex
	events []Change
	lost   bool
	failed error
	asked  time.Time
}

// CreateWatcher begins to watch a directory for callers that poll, and returns
// the watcher's id. One that nobody polls for 10 minutes ends.
func (v View) CreateWatcher(spec WatchSpec) (string, error) {
	s := v.store
	s.expirePollers(time.Now())
	s.mu.Lock()
	full, closed := len(s.watchers) >= maxPollers, s.closed
	s.mu.Unlock()
	if closed {
		return "", fault.New(fault.Unavailable, "the guest is shutting down: no new watchers")
	}
	if full {
		return "", fault.New(fault.Exhausted, "%d watchers are open: remove one first", maxPollers)
	}
	w, err := v.Watch(spec)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &poller{uid: v.user.UID, watch: w, cancel: cancel, asked: time.Now()}
	id := watcherID()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.watchers) >= maxPollers {
		cancel()
		w.Close()
		return "", fault.New(fault.Exhausted, "too many watchers are open: remove one first")
	}
	s.watchers[id] = p
	s.workers.Go(func() { s.collect(ctx, id, p) })
	return id, nil
}

func watcherID() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails
	return "w" + hex.EncodeToString(b[:])
}

// collect runs until the watcher is removed or nobody asked for too long.
func (s *Store) collect(ctx context.Context, id string, p *poller) {
	defer p.watch.Close()
	for {
		c, ok, err := p.watch.Next(ctx, pollerExpiry/4)
		if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		switch {
		case err != nil:
			p.failed = err
		case ok && len(p.events) < maxPollEvents:
			p.events = append(p.events, c)
		case ok:
			p.lost = true
		}
		expired := time.Since(p.asked) > pollerExpiry
		p.mu.Unlock()
		if expired {
			s.remove(id, p)
			return
		}
		if err != nil {
			// What was seen stays to be asked for; expirePollers ends it.
			return
		}
	}
}

// expirePollers drops the watchers that failed and were then forgotten.
func (s *Store) expirePollers(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.watchers {
		p.mu.Lock()
		expired := now.Sub(p.asked) > pollerExpiry
		p.mu.Unlock()
		if expired {
			p.cancel()
			delete(s.watchers, id)
		}
	}
}

func (s *Store) remove(id string, p *poller) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watchers[id] == p {
		delete(s.watchers, id)
	}
	p.cancel()
}

// WatcherEvents returns the changes since the last call. When more came than
// are kept, it says so with an Exhausted error once, with nothing returned;
// when the watch ended by itself, with the reason, after the last events.
func (v View) WatcherEvents(id string) ([]Change, error) {
	p, err := v.watcher(id)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = time.Now()
	events := p.events
	p.events = nil
	if p.lost {
		p.lost = false
		return nil, fault.New(fault.Exhausted, "more than %d changes since the last call: some were lost; list the directory again", maxPollEvents)
	}
	if len(events) == 0 && p.failed != nil {
		return nil, p.failed
	}
	return events, nil
}

// RemoveWatcher ends a watcher.
func (v View) RemoveWatcher(id string) error {
	p, err := v.watcher(id)
	if err != nil {
		return err
	}
	v.store.remove(id, p)
	return nil
}

// watcher finds one that the user made; root finds all.
func (v View) watcher(id string) (*poller, error) {
	s := v.store
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.watchers[id]
	if p == nil || (v.user.UID != 0 && v.user.UID != p.uid) {
		return nil, fault.New(fault.NotFound, "no watcher %s: it was removed, or nobody asked it for %s", quote(id), pollerExpiry)
	}
	return p, nil
}

// Close ends all watchers and waits for their work.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	for id, p := range s.watchers {
		p.cancel()
		delete(s.watchers, id)
	}
	s.mu.Unlock()
	s.workers.Wait()
	return nil
}
