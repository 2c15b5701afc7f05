package link

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
)

// vport is a virtio-serial port with QEMU's socket in front of it, bad manners
// included: small buffers, bytes of the last connection delivered to the next,
// connections cut anywhere, a guest that is not told that the host has gone
// when the host is back soon, EOF at once while it stays away.
type vport struct {
	t    testing.TB
	mu   sync.Mutex
	cond sync.Cond

	toGuest, toHost []byte
	host            *vhost // the connection that stands
	shown           bool   // what the guest is told: a host is connected
	guest           *vguest
	eofs            int // how often a guest read found no host
}

const vportBuffer = 8 << 10

func newVport(t testing.TB) *vport {
	v := &vport{t: t}
	v.cond.L = &v.mu
	return v
}

// vhost is the host's end of one connection, with its two pumps.
type vhost struct {
	net.Conn
	v    *vport
	far  net.Conn // QEMU's end of the socket
	wg   sync.WaitGroup
	gone bool // guarded by v.mu
}

// connect connects a host, after the former one has gone.
func (v *vport) connect() net.Conn {
	v.t.Helper()
	v.mu.Lock()
	for v.host != nil {
		v.cond.Wait()
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		v.mu.Unlock()
		v.t.Fatal(err)
	}
	h := &vhost{v: v, Conn: v.conn(fds[0]), far: v.conn(fds[1])}
	v.host, v.shown = h, true
	v.cond.Broadcast()
	v.mu.Unlock()
	h.wg.Go(h.pumpIn)
	h.wg.Go(h.pumpOut)
	v.t.Cleanup(func() { _ = h.Close() })
	return h
}

func (v *vport) conn(fd int) net.Conn {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		v.t.Fatal(err)
	}
	return c
}

// Close is the end of the host, as by a kill: nothing is flushed.
func (h *vhost) Close() error {
	h.v.mu.Lock()
	if h.gone {
		h.v.mu.Unlock()
		return nil
	}
	h.gone = true
	h.v.cond.Broadcast()
	h.v.mu.Unlock()
	_ = h.Conn.Close()
	_ = h.far.Close()
	h.wg.Wait()
	h.v.mu.Lock()
	h.v.host = nil
	h.v.cond.Broadcast()
	h.v.mu.Unlock()
	return nil
}

// leave tells the guest that the host is away, which is not done by Close.
func (v *vport) leave() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.shown = false
	v.cond.Broadcast()
}

func (h *vhost) pumpIn() {
	buf := make([]byte, 4<<10)
	for {
		n, err := h.far.Read(buf)
		if err != nil {
			return
		}
		h.v.mu.Lock()
		p := buf[:n]
		for len(p) > 0 {
			for len(h.v.toGuest) >= vportBuffer && !h.gone {
				h.v.cond.Wait()
			}
			if h.gone {
				p = p[:rand.IntN(len(p)+1)] // cut anywhere
			}
			k := min(len(p), vportBuffer)
			h.v.toGuest = append(h.v.toGuest, p[:k]...)
			p = p[k:]
			h.v.cond.Broadcast()
		}
		h.v.mu.Unlock()
	}
}

func (h *vhost) pumpOut() {
	for {
		h.v.mu.Lock()
		for len(h.v.toHost) == 0 && !h.gone {
			h.v.cond.Wait()
		}
		if h.gone {
			h.v.mu.Unlock()
			return
		}
		n := min(len(h.v.toHost), 4<<10)
		p := append([]byte(nil), h.v.toHost[:n]...)
		h.v.toHost = h.v.toHost[n:]
		h.v.cond.Broadcast()
		h.v.mu.Unlock()
		if _, err := h.far.Write(p); err != nil {
			return // these bytes are lost
		}
	}
}

// vguest is the device as one guest process has it open.
type vguest struct {
	v      *vport
	closed bool
}

// open opens the device for a guest; only one at a time can have it.
func (v *vport) open(context.Context) (io.ReadWriteCloser, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.guest != nil {
		return nil, syscall.EBUSY
	}
	v.guest = &vguest{v: v}
	return v.guest, nil
}

func (g *vguest) Read(p []byte) (int, error) {
	g.v.mu.Lock()
	defer g.v.mu.Unlock()
	for {
		switch {
		case g.closed:
			return 0, os.ErrClosed
		case len(g.v.toGuest) > 0:
			n := copy(p, g.v.toGuest)
			g.v.toGuest = g.v.toGuest[n:]
			g.v.cond.Broadcast()
			return n, nil
		case !g.v.shown:
			g.v.eofs++
			return 0, io.EOF
		}
		g.v.cond.Wait()
	}
}

func (g *vguest) Write(p []byte) (int, error) {
	g.v.mu.Lock()
	defer g.v.mu.Unlock()
	total := 0
	for len(p) > 0 {
		for (len(g.v.toHost) >= vportBuffer || !g.v.shown) && !g.closed {
			g.v.cond.Wait()
		}
		if g.closed {
			return total, os.ErrClosed
		}
		n := min(len(p), vportBuffer-len(g.v.toHost))
		g.v.toHost = append(g.v.toHost, p[:n]...)
		p, total = p[n:], total+n
		g.v.cond.Broadcast()
	}
	return total, nil
}

func (g *vguest) Close() error {
	g.v.mu.Lock()
	defer g.v.mu.Unlock()
	if !g.closed {
		g.closed = true
		g.v.guest = nil
		g.v.cond.Broadcast()
	}
	return nil
}
