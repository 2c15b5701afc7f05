package proxy

import (
	"context"
	"io"
	"net/http"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/relay"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// established accepts a CONNECT over HTTP/1.1.
const established = "HTTP/1.1 200 Connection established\r\n\r\n"

// tunnel carries raw bytes between the caller and a port.
func (p *Proxy) tunnel(w http.ResponseWriter, r *http.Request, v visit) {
	guest, err := v.guest.DialPort(r.Context(), v.port)
	if err != nil {
		p.lost(w, r, v, &dialError{err})
		return
	}
	defer guest.Close()
	caller, err := open200(w, r)
	if err != nil {
		p.log.DebugContext(r.Context(), "tunnel not opened", "sandbox_id", v.sandbox, "port", v.port, "err", err)
		return
	}
	defer caller.Close()
	defer context.AfterFunc(r.Context(), func() {
		caller.Close()
		guest.Close()
	})()
	relay.Join(caller, relay.NewConn(guest, nil), &p.buffers)
}

// tunnelDocker carries a connection to the Docker of a sandbox. HTTP/2 can't: its
// streams have no half-close.
func (p *Proxy) tunnelDocker(w http.ResponseWriter, r *http.Request, id sandbox.ID) {
	if p.docker == nil || r.ProtoMajor >= 2 {
		p.refuse(w, r, fault.New(fault.Unimplemented, "Docker is reached by CONNECT over HTTP/1.1 only"), "")
		return
	}
	caller, err := relay.Hijack(w, []byte(established))
	if err == nil {
		defer caller.Close()
		defer context.AfterFunc(r.Context(), func() { caller.Close() })()
		err = p.docker(id, caller)
	}
	if err != nil {
		p.log.DebugContext(r.Context(), "tunnel to Docker not opened", "sandbox_id", id, "err", err)
	}
}

// open200 accepts the tunnel and returns the caller's end of it.
func open200(w http.ResponseWriter, r *http.Request) (relay.Side, error) {
	if r.ProtoMajor < 2 {
		return relay.Hijack(w, []byte(established))
	}
	control := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if err := control.Flush(); err != nil {
		return nil, err
	}
	return &streamSide{body: r.Body, w: w, control: control}, nil
}

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

// CloseWrite implements relay.Side. It can't be told without ending the stream.
func (s *streamSide) CloseWrite() error { return relay.ErrNoHalfClose }

// Close implements io.Closer: it ends reading; returning ends the stream.
func (s *streamSide) Close() error { return s.body.Close() }
