package kubernetes

import (
	"context"
	"errors"
	"sync"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// life is one run of the program. Its certificates may be others than those of
// the run before.
type life struct {
	pid      int
	observer *observer
	watcher  *watcher

	access   Access
	mu       sync.Mutex
	api      *API // nil: not connected yet
	ended    bool
	followed bool // somebody sees to its end
}

// current returns the life of the program that runs now.
func (c *Cluster) current(d Distribution) *life {
	st, _ := c.p.Units.Status(UnitName)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life == nil || c.life.pid != st.PID {
		c.forget()
		l := &life{pid: st.PID, access: d.API}
		l.observer = newObserver(d, l.connect)
		l.watcher = &watcher{look: l.observer.look, all: &c.all}
		c.life = l
	}
	return c.life
}

// forget ends the last life. Call it with the lock held.
func (c *Cluster) forget() {
	if c.life != nil {
		c.life.close()
		c.life = nil
	}
}

// errEnded is for those who hold a life that is over.
var errEnded = errors.New("the cluster has ended")

// connect returns the API, once its credentials are there.
func (l *life) connect() (*API, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return nil, errEnded
	}
	if l.api != nil {
		return l.api, nil
	}
	api, err := connectAPI(l.access)
	if err == nil {
		l.api = api
	}
	return api, err
}

func (l *life) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	if l.api != nil {
		l.api.close()
	}
	l.observer.close()
}

// WaitAPI returns the API once it is ready, however long nobody starts it.
func (c *Cluster) WaitAPI(ctx context.Context) (*API, error) {
	select {
	case <-c.asked:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for {
		st, changed := c.p.Units.Status(UnitName)
		if st.State == supervise.Ready {
			d, err := c.distribution()
			if err != nil {
				return nil, err
			}
			l := c.current(d)
			if api, err := l.connect(); err == nil {
				c.follow(l)
				return api, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// follow closes the API of l as soon as its program is not ready any more.
func (c *Cluster) follow(l *life) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.followed || l.ended {
		return
	}
	l.followed = true
	c.all.Go(func() {
		for {
			st, changed := c.p.Units.Status(UnitName)
			if st.State != supervise.Ready || st.PID != l.pid {
				l.close()
				return
			}
			select {
			case <-changed:
			case <-c.ctx.Done():
				return
			}
		}
	})
}
