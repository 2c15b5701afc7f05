package ports

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/host/relay"
)

// connectTime bounds the way of a new connection to its port, a resume of the
// sandbox included.
const connectTime = 2 * time.Minute

// listener is one open port of the host. It leads to one port of one guest.
type listener struct {
	key       key
	box       *box
	guestPort uint16
	by        *binding // guarded by the table's mu
	tcp       net.Listener
	udp       *net.UDPConn

	ctx context.Context // ends when it is closed
	end context.CancelFunc

	flows flowTable // of UDP
}

// serves reports whether l leads where bd does.
func (l *listener) serves(bd *binding) bool {
	return l.box == bd.owner.box && l.guestPort == bd.guestPort(bd.owner.id)
}

// close closes the port. Those who wait for l end by themselves.
func (l *listener) close() {
	l.end()
	l.free()
}

// free gives the port back to the host.
func (l *listener) free() {
	if l.tcp != nil {
		_ = l.tcp.Close()
	} else {
		_ = l.udp.Close()
	}
}

// serve takes connections or datagrams until the listener is closed.
func (l *listener) serve() {
	step := l.acceptOne
	if l.udp != nil {
		buf := make([]byte, maxDatagram)
		step = func() error { return l.receiveOne(buf) }
	}
	const most = time.Second
	for wait := time.Millisecond; ; {
		err := step()
		switch {
		case err == nil:
			wait = time.Millisecond
			continue
		case l.ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		}
		// Such as too many open files, or the report of a refused answer.
		if delay.For(l.ctx, wait) != nil {
			return
		}
		wait = min(2*wait, most)
	}
}

// acceptOne takes one connection, and resets it when the sandbox has too many:
// so none of its other ports, and no other sandbox, waits for it.
func (l *listener) acceptOne() error {
	c, err := l.tcp.Accept()
	if err != nil {
		return err
	}
	b := l.box
	if b.conns.Add(1) > MaxConns {
		b.conns.Add(-1)
		abort(c)
		return nil
	}
	b.t.wg.Go(func() {
		defer b.conns.Add(-1)
		l.carry(c)
	})
	return nil
}

// carry connects c with the port of the guest, until both have ended. The
// sandbox is in use meanwhile. A guest that can't be reached is a reset.
func (l *listener) carry(c net.Conn) {
	b := l.box
	guest, done, err := l.connect(b.ctx, func(ctx context.Context, g Guest) (net.Conn, error) { return g.DialPort(ctx, l.guestPort) })
	if err != nil {
		b.t.p.Log.Debug("published port can't be reached", "sandbox_id", b.id, "port", l.key.at, "error", err)
		abort(c)
		return
	}
	defer done()
	defer guest.Close()
	defer c.Close()
	defer context.AfterFunc(b.ctx, func() {
		abort(c)
		abort(guest)
	})()
	relay.Join(strict{relay.NewConn(c, nil), guest}, strict{relay.NewConn(guest, nil), c}, &b.t.buffers)
}

// strict is a connection whose break is one of its peer too: a reset must not
// look like an end, or somebody takes a part for the whole.
type strict struct {
	*relay.Conn
	peer net.Conn
}

// Read implements io.Reader.
func (s strict) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		abort(s.peer)
	}
	return n, err
}

// abort closes c so that its peer sees a reset, where that can be.
func abort(c net.Conn) {
	switch c := c.(type) {
	case interface{ Reset() }:
		c.Reset()
	case interface{ SetLinger(sec int) error }:
		_ = c.SetLinger(0)
	}
	_ = c.Close()
}

// connect takes the sandbox in use and dials its guest.
func (l *listener) connect(ctx context.Context, dial func(context.Context, Guest) (net.Conn, error)) (c net.Conn, done func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	g, done, err := l.box.t.p.Sandboxes.Use(ctx, l.box.id)
	if err != nil {
		return nil, nil, err
	}
	if c, err = dial(ctx, g); err != nil {
		done()
		return nil, nil, err
	}
	return c, done, nil
}
