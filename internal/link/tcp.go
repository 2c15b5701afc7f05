package link

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// dialTimeout bounds the connecting of one stream within the guest. It is
// short: everything that can answer is on the same machine.
const dialTimeout = 5 * time.Second

// DialLocal connects to a TCP port of this machine as a program on it would:
// on the loopback addresses first, then on its own others, so that servers
// bound to a single address are found too. Its error is that of the last
// address that did more than refuse, else ECONNREFUSED.
func DialLocal(ctx context.Context, port uint16) (net.Conn, error) {
	var d net.Dialer
	var firm error
	for _, a := range localAddresses() {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(a, strconv.Itoa(int(port))))
		switch {
		case err == nil:
			return c, nil
		case ctx.Err() != nil:
			return nil, err
		case !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EADDRNOTAVAIL) &&
			!errors.Is(err, syscall.EAFNOSUPPORT) && !errors.Is(err, syscall.ENETUNREACH):
			firm = err
		}
	}
	if firm == nil {
		firm = syscall.ECONNREFUSED
	}
	return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{Port: int(port)}, Err: firm}
}

// localAddresses returns the addresses of this machine to try, at most 16.
func localAddresses() []string {
	list := []string{"127.0.0.1", "::1"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return list
	}
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if ok && n.IP.IsGlobalUnicast() && len(list) < 16 {
			list = append(list, n.IP.String())
		}
	}
	return list
}

// forward connects s by dial and has carry do its work, which lasts until both
// sides have ended, the session is lost or ctx ends.
func forward(ctx context.Context, s *Stream, dial func(context.Context) (net.Conn, error), carry func(*Stream, net.Conn)) {
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	c, err := dial(dctx)
	cancel()
	if err != nil {
		s.answer(dialStatus(err), err.Error())
		return
	}
	s.accept()
	stop := context.AfterFunc(ctx, func() {
		abort(c)
		s.Reset()
	})
	defer stop()
	carry(s, c)
	_ = s.Close()
	_ = c.Close()
}

func dialStatus(err error) Status {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT): // no such Unix socket
		return StatusRefused
	case errors.Is(err, syscall.EAGAIN): // too many wait at a Unix socket
		return StatusBusy
	}
	return StatusUnreachable
}

// carryTCP carries bytes both ways between s and a TCP connection.
func carryTCP(s *Stream, c net.Conn) {
	var wg sync.WaitGroup
	wg.Go(func() { pipe(s, c) })
	wg.Go(func() { pipe(c, s) })
	wg.Wait()
}

// pipe carries bytes from src to dst. It passes a clean end on as a half close;
// anything else ends both connections hard, so that no side takes a part for
// the whole.
func pipe(dst, src net.Conn) {
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 32<<10))
	if err == nil {
		if w, ok := dst.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
			return
		}
	}
	abort(dst)
	abort(src)
}

// abort closes c so that its peer sees a reset.
func abort(c net.Conn) {
	switch c := c.(type) {
	case *Stream:
		c.Reset()
	case *net.TCPConn:
		_ = c.SetLinger(0)
		_ = c.Close()
	default:
		_ = c.Close()
	}
}
