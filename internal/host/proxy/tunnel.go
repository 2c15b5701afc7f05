package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// tunnel carries raw bytes between the caller and a port.
func (p *Proxy) tunnel(w http.ResponseWriter, r *http.Request, v visit) {
	guest, err := v.guest.DialPort(r.Context(), v.port)
	if err != nil {
		p.lost(w, r, v, &dialError{err})
		return
	}
	defer guest.Close()
	caller, err := p.open200(w, r)
	if err != nil {
		p.log.DebugContext(r.Context(), "tunnel not opened", "sandbox_id", v.sandbox, "port", v.port, "err", err)
		return
	}
	defer caller.Close()
	defer context.AfterFunc(r.Context(), func() {
		caller.Close()
		guest.Close()
	})()
	p.join(caller, guest)
}

// side is one end of a tunnel.
type side interface {
	io.ReadWriteCloser
	// CloseWrite tells the other end that nothing more comes.
	CloseWrite() error
}

// open200 accepts the tunnel and returns the caller's end of it.
func (p *Proxy) open200(w http.ResponseWriter, r *http.Request) (side, error) {
	control := http.NewResponseController(w)
	if r.ProtoMajor >= 2 {
		w.WriteHeader(http.StatusOK)
		if err := control.Flush(); err != nil {
			return nil, err
		}
		return &streamSide{body: r.Body, w: w, control: control}, nil
	}
	conn, buffered, err := control.Hijack()
	if err != nil {
		return nil, err
	}
	err = conn.SetDeadline(time.Time{})
	if err == nil {
		_, err = io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	// Bytes that came right behind the request are in the server's buffer.
	early := io.LimitReader(buffered.Reader, int64(buffered.Reader.Buffered()))
	return &connSide{Conn: conn, r: io.MultiReader(early, conn)}, nil
}

// join copies both ways until both have ended, or one has failed.
func (p *Proxy) join(caller side, guest net.Conn) {
	var both sync.WaitGroup
	both.Go(func() {
		if p.pump(guest, caller) != nil || closeWrite(guest) != nil {
			guest.Close()
			caller.Close()
		}
	})
	both.Go(func() {
		if p.pump(caller, guest) != nil || caller.CloseWrite() != nil {
			guest.Close()
			caller.Close()
		}
	})
	both.Wait()
}

// pump copies until src ends.
func (p *Proxy) pump(dst io.Writer, src io.Reader) error {
	buf := p.buffers.Get()
	defer p.buffers.Put(buf)
	// Without the wrappers io.CopyBuffer would ignore buf.
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf)
	return err
}

// errNoHalfClose ends a tunnel to an end that can only be closed as a whole.
var errNoHalfClose = errors.New("no half-close")

func closeWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errNoHalfClose
}

// connSide is the caller's end over HTTP/1.1: the connection itself.
type connSide struct {
	net.Conn
	r io.Reader
}

// Read reads what was buffered first.
func (c *connSide) Read(b []byte) (int, error) { return c.r.Read(b) }

// CloseWrite implements side.
func (c *connSide) CloseWrite() error { return closeWrite(c.Conn) }

// streamSide is the caller's end over HTTP/2: a stream, which ends when the
// handler returns.
type streamSide struct {
	body    io.ReadCloser
	w       http.ResponseWriter
	control *http.ResponseController
}

// Read implements io.Reader.
func (s *streamSide) Read(b []byte) (int, error) { return s.body.Read(b) }

// Write implements io.Writer; what it writes is on its way when it returns.
func (s *streamSide) Write(b []byte) (int, error) {
	n, err := s.w.Write(b)
	if err == nil {
		err = s.control.Flush()
	}
	return n, err
}

// CloseWrite implements side. It can't be told without ending the stream.
func (s *streamSide) CloseWrite() error { return errNoHalfClose }

// Close implements io.Closer: it ends reading; returning ends the stream.
func (s *streamSide) Close() error { return s.body.Close() }
