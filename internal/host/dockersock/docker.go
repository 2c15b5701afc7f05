package dockersock

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/link"
)

// How often a guest is asked whether its Docker is up by now: there is no event
// for it. A start takes seconds.
const (
	firstAsk = 50 * time.Millisecond
	lastAsk  = time.Second
)

// crashGrace is how long a daemon that was up may be taken for one that can't be
// started: it ended a moment ago, and the guest has hardly noticed.
const crashGrace = 5 * time.Second

// docker is what is known of a guest's Docker. All is guarded by the door's mu.
type docker struct {
	// upIn is the guest in which it was up when last heard of, nil: unknown.
	upIn guestconn.Guest
	// lostIn is the guest in which it was up before, nil: none.
	lostIn guestconn.Guest
	// start is under way.
	start *start
}

// start is one attempt to have it up, for all who wait.
type start struct {
	guest guestconn.Guest
	lost  bool // it was up before
	done  chan struct{}
	err   error // once done is closed
}

// dial connects to the daemon of guest g, which is brought up if need be.
func (d *door) dial(ctx context.Context, g guestconn.Guest) (net.Conn, error) {
	for again := false; ; again = true {
		if err := d.ensure(ctx, g); err != nil {
			return nil, err
		}
		conn, err := g.DialDocker(ctx)
		if err == nil || again || !refused(err) {
			return conn, err
		}
		d.down(g)
	}
}

// refused reports whether nothing listens at the daemon's socket.
func refused(err error) bool {
	var status *link.StatusError
	return errors.As(err, &status) && status.Status == link.StatusRefused
}

// down notes that the daemon of g can't be assumed to be up.
func (d *door) down(g guestconn.Guest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.docker.upIn == g {
		d.docker.upIn, d.docker.lostIn = nil, g
	}
}

// ensure returns when the daemon of g is up, as far as is known.
func (d *door) ensure(ctx context.Context, g guestconn.Guest) error {
	s := d.join(g)
	if s == nil {
		return nil
	}
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// join returns the start to wait for, a new one if there is none. nil: the
// daemon is up.
func (d *door) join(g guestconn.Guest) *start {
	d.mu.Lock()
	if d.docker.upIn == g {
		d.mu.Unlock()
		return nil
	}
	s := d.docker.start
	if s != nil && s.guest == g {
		d.mu.Unlock()
		return s
	}
	s = &start{guest: g, lost: d.docker.lostIn == g, done: make(chan struct{})}
	d.docker.start = s
	d.mu.Unlock()
	if !d.run(func() { d.finish(s, d.bringUp(s)) }) {
		d.finish(s, fault.New(fault.Unavailable, "sandbox %s is going away", d.id))
	}
	return s
}

func (d *door) finish(s *start, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.docker.start == s {
		d.docker.start = nil
		if err == nil {
			d.docker.upIn = s.guest
		}
	}
	s.err = err
	close(s.done)
}

// bringUp asks the guest for Docker and waits until it is there. Nobody who waits
// has to stay for that.
func (d *door) bringUp(s *start) error {
	ctx, cancel := context.WithTimeout(d.open, d.s.p.startLimit)
	defer cancel()
	began, wait, said := time.Now(), firstAsk, "its guest agent did not answer"
	for begin := true; ; {
		e, err := s.guest.EnsureRuntime(ctx, begin)
		begin = e.Status == guestconn.EnsureFailed
		switch {
		case ctx.Err() != nil:
			return fault.New(fault.Deadline, "Docker in sandbox %s was not up after %s: %s", d.id, time.Since(began).Round(time.Second), said)
		case err != nil:
			return d.noDocker(err)
		case e.Ready:
			d.log.Debug("Docker is up", "status", e.Status, "took", time.Since(began))
			return nil
		case e.Status == guestconn.EnsureFailed && (!s.lost || time.Since(began) > crashGrace):
			return d.notStarted(e.Message)
		}
		said = e.Message
		_ = delay.For(ctx, wait) // its end is seen above
		wait = min(2*wait, lastAsk)
	}
}

// noDocker is an agent that could not be asked.
func (d *door) noDocker(err error) error {
	if fault.Is(err, fault.Unimplemented) {
		return fault.New(fault.Unimplemented,
			"the guest agent of sandbox %s is older than hutchd and knows no Docker: make the sandbox anew (from a template or snapshot that was not kept from before)", d.id)
	}
	return err
}

// notStarted is a guest whose Docker does not come up.
func (d *door) notStarted(message string) error {
	if strings.Contains(message, "missing") {
		return fault.New(fault.Precondition,
			"sandbox %s has no Docker in its image (%s). Make one that has: hutch template build docker, then hutch create docker", d.id, message)
	}
	return fault.New(fault.Unavailable, "Docker does not start in sandbox %s: %s", d.id, message)
}
