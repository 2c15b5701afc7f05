package guestconn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
)

// How long the connection waits before it tries again, from the first failure
// on. A session that lived longer than steady starts this anew.
const (
	firstBackoff = 10 * time.Millisecond
	lastBackoff  = 2 * time.Second
	steady       = time.Second
)

// Params is what a connection is made of.
type Params struct {
	// Dial connects to the guest's port, a byte pipe.
	Dial func(ctx context.Context) (net.Conn, error)
	// Done is closed when the VM is gone. nil: never.
	Done <-chan struct{}
	Log  *slog.Logger // nil: none

	guardExtra time.Duration // tests only; 0: guardExtra
}

// Conn is a Guest over internal/link.
type Conn struct {
	p         Params
	cancel    context.CancelFunc
	wg        sync.WaitGroup
	transport *transport

	agent   arcboxv1connect.AgentServiceClient
	process processpbconnect.ProcessClient

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when what follows changes
	sess    *link.Session // nil while there is none
	lastErr error         // why there is none
	ended   error         // why there will be none
}

var _ Guest = (*Conn)(nil)

// New starts to connect, and keeps connecting until Close or Done.
func New(p Params) *Conn {
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	if p.guardExtra == 0 {
		p.guardExtra = guardExtra
	}
	c := &Conn{p: p, changed: make(chan struct{})}
	c.transport = newTransport(c)
	c.makeClients()
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	if p.Done != nil {
		c.wg.Go(func() {
			select {
			case <-p.Done:
				c.finish(fault.New(fault.Unavailable, "guest is gone: its virtual machine has ended"))
				cancel()
			case <-ctx.Done():
			}
		})
	}
	c.wg.Go(func() { c.run(ctx) })
	return c
}

// Close ends the session and all its streams, and waits for the goroutines.
// Calls that wait for the guest fail with Unavailable.
func (c *Conn) Close() error {
	c.finish(fault.New(fault.Unavailable, "connection to guest is closed"))
	c.cancel()
	c.wg.Wait()
	c.transport.close()
	return nil
}

// run keeps a session until ctx ends.
func (c *Conn) run(ctx context.Context) {
	wait := firstBackoff
	for told := ""; ; {
		s, err := c.connect(ctx)
		if err == nil {
			told = ""
			start := time.Now()
			c.set(s, nil)
			select {
			case <-s.Done():
			case <-ctx.Done():
			}
			err = s.Err()
			_ = s.Close()
			if time.Since(start) > steady {
				wait = firstBackoff
			}
		}
		if ctx.Err() != nil {
			c.set(nil, nil)
			return
		}
		c.set(nil, err)
		if msg := err.Error(); msg != told { // a lasting fault is told once
			told = msg
			c.p.Log.Info("link to guest is down, connecting again", "err", err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
		wait = min(2*wait, lastBackoff)
	}
}

// connect makes one session.
func (c *Conn) connect(ctx context.Context) (*link.Session, error) {
	raw, err := c.p.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to guest's port: %w", err)
	}
	return link.Dial(ctx, raw, link.DialParams{Log: c.p.Log})
}

// set tells everyone who waits of a session, or of why there is none.
func (c *Conn) set(s *link.Session, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sess, c.lastErr = s, err
	close(c.changed)
	c.changed = make(chan struct{})
}

// finish makes all calls fail with err from here on. Only the first counts.
func (c *Conn) finish(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		return
	}
	c.ended = err
	close(c.changed)
	c.changed = make(chan struct{})
}

// session waits for a session that lives.
func (c *Conn) session(ctx context.Context) (*link.Session, error) {
	for {
		c.mu.Lock()
		s, changed, lastErr, ended := c.sess, c.changed, c.lastErr, c.ended
		c.mu.Unlock()
		var version *link.VersionError
		switch {
		case ended != nil:
			return nil, ended
		case s != nil && s.Err() == nil:
			return s, nil
		case errors.As(lastErr, &version): // waiting mends nothing
			return nil, fault.As(fault.Precondition, lastErr)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, waitError(ctx, lastErr)
		}
	}
}

// waitError is a wait for the guest that the caller's context ended.
func waitError(ctx context.Context, lastErr error) error {
	err := context.Cause(ctx)
	if lastErr != nil {
		return fault.New(fault.Of(ctx.Err()), "wait for guest agent: %w (last: %v)", err, lastErr)
	}
	return fault.New(fault.Of(ctx.Err()), "wait for guest agent: %w", err)
}

// open opens a stream on the current session, and on the next one when that
// has ended meanwhile: nothing was sent yet.
func (c *Conn) open(ctx context.Context, open func(*link.Session) (*link.Stream, error)) (*link.Stream, error) {
	for {
		s, err := c.session(ctx)
		if err != nil {
			return nil, err
		}
		stream, err := open(s)
		if err == nil {
			return stream, nil
		}
		var status *link.StatusError
		switch {
		case errors.As(err, &status):
			return nil, fault.As(statusClass(status.Status), err)
		case errors.Is(err, link.ErrStreams):
			return nil, fault.As(fault.Exhausted, err)
		case ctx.Err() != nil:
			return nil, fault.As(fault.Of(ctx.Err()), err)
		case s.Err() == nil:
			return nil, fault.As(fault.Unavailable, err)
		}
	}
}

// statusClass returns the class of a stream that the guest did not open.
func statusClass(s link.Status) fault.Class {
	switch s {
	case link.StatusDenied:
		return fault.Denied
	case link.StatusBusy:
		return fault.Exhausted
	case link.StatusBad:
		return fault.Unimplemented
	case link.StatusOK, link.StatusRefused, link.StatusUnreachable:
	}
	return fault.Unavailable
}

// Ready implements Guest.
func (c *Conn) Ready(ctx context.Context) (Hello, error) {
	s, err := c.session(ctx)
	if err != nil {
		return Hello{}, err
	}
	h := s.Hello()
	return Hello{AgentVersion: h.AgentVersion, Features: h.Features}, nil
}

// Transport implements Guest.
func (c *Conn) Transport() http.RoundTripper { return c.transport }
