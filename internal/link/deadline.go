package link

import (
	"net"
	"sync"
	"time"
)

// deadline is a point in time at which waiting calls give up.
type deadline struct{ cur *alarm }

type alarm struct {
	rang  bool
	timer *time.Timer
}

// hit tells whether the time is over. Called with mu held.
func (d *deadline) hit() bool { return d.cur != nil && d.cur.rang }

// set moves the deadline to t, the zero time being none, and wakes those who
// wait on cond. Called with mu held.
func (d *deadline) set(s *Stream, cond *sync.Cond, t time.Time) {
	if d.cur != nil && d.cur.timer != nil {
		d.cur.timer.Stop()
	}
	d.cur = nil
	if !t.IsZero() {
		a := &alarm{}
		d.cur = a
		if left := time.Until(t); left <= 0 {
			a.rang = true
		} else {
			a.timer = time.AfterFunc(left, func() {
				s.m.mu.Lock()
				defer s.m.mu.Unlock()
				a.rang = true
				cond.Broadcast()
			})
		}
	}
	cond.Broadcast()
}

// SetDeadline sets both deadlines.
func (s *Stream) SetDeadline(t time.Time) error { return s.setDeadlines(t, true, true) }

// SetReadDeadline sets when Read gives up.
func (s *Stream) SetReadDeadline(t time.Time) error { return s.setDeadlines(t, true, false) }

// SetWriteDeadline sets when Write gives up waiting for room.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.setDeadlines(t, false, true) }

func (s *Stream) setDeadlines(t time.Time, read, write bool) error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.closed {
		return s.opError("set", net.ErrClosed)
	}
	if read {
		s.rdl.set(s, &s.rcond, t)
	}
	if write {
		s.wdl.set(s, &s.wcond, t)
	}
	return nil
}

// opError dresses err as the net package's connections do: callers look for a
// net.Error.
func (s *Stream) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "link", Addr: Addr(s.target), Err: err}
}

// LocalAddr returns this end's address.
func (s *Stream) LocalAddr() net.Addr { return s.addr(s.m.host) }

// RemoteAddr returns the other end's address.
func (s *Stream) RemoteAddr() net.Addr { return s.addr(!s.m.host) }

func (s *Stream) addr(host bool) net.Addr {
	if host {
		return Addr("host")
	}
	return Addr(s.target)
}

// Addr is an end of a stream: "host", or the target in the guest.
type Addr string

// Network returns "link".
func (a Addr) Network() string { return "link" }

// String returns the end's name.
func (a Addr) String() string { return string(a) }
