package relay

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// linger is how long a caller may go on sending to a guest that reads no more,
// once it has all that the guest had to say.
const linger = 5 * time.Second

// ErrNoHalfClose is a side that can only be closed as a whole.
var ErrNoHalfClose = errors.New("no half-close")

// Side is one end of a connection in both directions.
type Side interface {
	io.ReadWriteCloser
	// CloseWrite tells the other end that nothing more comes.
	CloseWrite() error
}

// Conn is a connection as a Side.
type Conn struct {
	net.Conn
	r io.Reader
}

// NewConn returns conn, of which r reads what was read ahead and then the rest.
// nil: conn itself.
func NewConn(conn net.Conn, r io.Reader) *Conn {
	if r == nil {
		r = conn
	}
	return &Conn{conn, r}
}

// Read reads what was read ahead first.
func (c *Conn) Read(b []byte) (int, error) { return c.r.Read(b) }

// CloseWrite implements Side.
func (c *Conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return ErrNoHalfClose
}

// Hijack takes over the connection of a request over HTTP/1.1, and answers it
// with head.
func Hijack(w http.ResponseWriter, head []byte) (*Conn, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	err = conn.SetDeadline(time.Time{})
	if err == nil {
		_, err = conn.Write(head)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	// Bytes that came right behind the request are in the server's buffer.
	early := io.LimitReader(buffered.Reader, int64(buffered.Reader.Buffered()))
	return NewConn(conn, io.MultiReader(early, conn)), nil
}

// Join copies both ways until both have ended or one has failed, and closes
// both sides.
//
// A guest that reads no more (EPIPE) has not failed: what it says is still
// carried, to its end. A caller that is gone as a whole is told from one that
// has only ended its side where the kernel knows: at Unix sockets.
func Join(caller, guest Side, buffers *Buffers) {
	j := &joint{caller: caller, guest: guest, buffers: buffers, said: make(chan struct{})}
	j.both.Go(j.in)
	j.both.Go(j.out)
	j.both.Wait()
	j.end()
	j.watch.Wait()
}

type joint struct {
	caller, guest Side
	buffers       *Buffers
	said          chan struct{} // closed when out is over
	both, watch   sync.WaitGroup
}

func (j *joint) end() {
	_ = j.guest.Close()
	_ = j.caller.Close()
}

func (j *joint) in() {
	switch err := j.pump(j.guest, j.caller); {
	case err == nil:
		if j.guest.CloseWrite() != nil {
			j.end()
			return
		}
		j.watch.Go(func() {
			if hungUp(j.caller) {
				j.end()
			}
		})
	case errors.Is(err, syscall.EPIPE):
		j.discard()
	default:
		j.end()
	}
}

func (j *joint) out() {
	defer close(j.said)
	if j.pump(j.caller, j.guest) != nil || j.caller.CloseWrite() != nil {
		j.end()
	}
}

// discard reads what nobody wants, so that a caller that is still sending gets
// to see the end of what the guest said.
func (j *joint) discard() {
	over := make(chan struct{})
	j.watch.Go(func() {
		select {
		case <-over:
			return
		case <-j.said:
		}
		late := time.NewTimer(linger)
		defer late.Stop()
		select {
		case <-over:
		case <-late.C:
			_ = j.caller.Close()
		}
	})
	_ = j.pump(io.Discard, j.caller)
	close(over)
}

// pump copies until src ends.
func (j *joint) pump(dst io.Writer, src io.Reader) error {
	buf := j.buffers.Get()
	defer j.buffers.Put(buf)
	// Without the wrappers io.CopyBuffer would ignore buf.
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf)
	return err
}

// hungUp waits until the other end of a socket is closed as a whole, which
// reading can't tell from a half-close, and reports whether that is so. It is
// not when the socket is closed here, or can't tell.
func hungUp(s Side) bool {
	c, ok := s.(*Conn)
	if !ok {
		return false
	}
	u, ok := c.Conn.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	gone := false
	err = raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}} // of an end as a whole it tells without being asked
		_, err := unix.Poll(p, 0)
		gone = err == nil && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
		return gone || err != nil && !errors.Is(err, unix.EINTR)
	})
	return err == nil && gone
}
