package link

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// SocketDocker is the name of dockerd's Unix socket.
const SocketDocker = "docker"

// dialSocket returns what connects to the Unix socket at path.
func dialSocket(path string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

// carrySocket carries bytes between s and a Unix socket until both sides have
// ended.
//
// The end of a Unix socket's peer takes nothing back, unlike TCP's reset: what
// the peer had written is there to be read, also when the peer leaves behind
// what it has not read itself, of which the kernel tells by EPIPE and
// ECONNRESET. So the host gets all of it, and then a clean end.
func carrySocket(s *Stream, c net.Conn) {
	half := c.(interface {
		CloseRead() error
		CloseWrite() error
	})
	var in sync.WaitGroup
	in.Go(func() {
		switch rerr, werr := copyParts(c, s); {
		case rerr != nil: // a reset, or the session is lost
			abort(c)
			abort(s)
		case werr == nil:
			_ = half.CloseWrite()
		}
		// Else the peer is gone: reading from it ends as well.
	})
	switch rerr, werr := copyParts(s, c); {
	case errors.Is(werr, syscall.EPIPE): // the host reads no more, and may have said more
		_ = half.CloseRead()
	case werr != nil, rerr != nil && !errors.Is(rerr, syscall.ECONNRESET):
		abort(c)
		abort(s)
	default:
		_ = s.CloseWrite()
	}
	in.Wait()
}

// copyParts copies until src ends, and tells what of the two has failed.
func copyParts(dst io.Writer, src io.Reader) (rerr, werr error) {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return nil, werr
			}
		}
		switch {
		case err == io.EOF:
			return nil, nil
		case err != nil:
			return err, nil
		}
	}
}
