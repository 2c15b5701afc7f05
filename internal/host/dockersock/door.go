package dockersock

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

const (
	// maxRequests bounds the requests in flight to one sandbox: its link has 512
	// streams, for everything.
	maxRequests = 256
	// readHeaderTimeout bounds the head of a request.
	readHeaderTimeout = 30 * time.Second
)

// door is the socket of one sandbox, and all connections through it.
type door struct {
	s      *Sockets
	id     sandbox.ID
	log    *slog.Logger
	server *http.Server
	open   context.Context
	stop   context.CancelFunc

	mu       sync.Mutex
	socket   *socket        // guarded by mu; nil: none
	requests int            // guarded by mu
	closed   bool           // guarded by mu
	running  sync.WaitGroup // Add is guarded by mu
	docker   docker
}

func newDoor(s *Sockets, id sandbox.ID) *door {
	d := &door{s: s, id: id, log: s.p.Log.With("sandbox_id", id)}
	d.open, d.stop = context.WithCancel(s.open)
	d.server = &http.Server{
		Handler: d, Protocols: new(http.Protocols), ReadHeaderTimeout: readHeaderTimeout,
		DisableGeneralOptionsHandler: true,
		BaseContext:                  func(net.Listener) context.Context { return d.open },
		ErrorLog:                     slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	d.server.Protocols.SetHTTP1(true)
	return d
}

// run starts f if the door is not closed. It ends before close returns.
func (d *door) run(f func()) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.running.Go(f)
	return true
}

// listen opens the socket at path, unless it is there. Called by one at a time.
func (d *door) listen(path string) error {
	d.mu.Lock()
	old := d.socket
	d.mu.Unlock()
	if old != nil && old.stands() {
		return nil
	}
	fresh, err := openSocket(path)
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.socket = fresh
	d.mu.Unlock()
	if old != nil {
		old.remove()
	}
	if !d.run(func() {
		if err := d.server.Serve(fresh); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			d.log.Warn("serve Docker socket", "error", err)
		}
	}) {
		fresh.remove()
	}
	return nil
}

func (d *door) listening() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.socket != nil
}

// serve serves one connection to its end.
func (d *door) serve(conn net.Conn) {
	one := &oneConn{conn: conn, ended: make(chan struct{})}
	if !d.run(func() { _ = d.server.Serve(one) }) { // which ends once it has the connection
		_ = conn.Close()
		return
	}
	select {
	case <-one.ended:
	case <-d.open.Done():
		_ = one.Close()
	}
}

// enter takes a place for a request. leave gives it back.
func (d *door) enter() (leave func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, fault.New(fault.Unavailable, "sandbox %s is going away", d.id)
	case d.requests >= maxRequests:
		return nil, fault.New(fault.Exhausted, "sandbox %s has %d requests for its Docker in flight, the most allowed; end some first", d.id, maxRequests)
	}
	d.requests++
	d.running.Add(1)
	return func() {
		d.mu.Lock()
		d.requests--
		d.mu.Unlock()
		d.running.Done()
	}, nil
}

// close removes the socket, ends all connections, and waits for them.
func (d *door) close() {
	d.mu.Lock()
	d.closed = true
	socket := d.socket
	d.socket = nil
	d.mu.Unlock()
	d.stop()
	if socket != nil {
		socket.remove()
	}
	if err := d.server.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		d.log.Debug("close Docker socket", "error", err)
	}
	d.running.Wait()
}

// oneConn is a listener for a connection that is there already.
type oneConn struct {
	conn  net.Conn
	ended chan struct{} // closed when the connection is

	mu    sync.Mutex
	taken bool
	once  sync.Once
}

// Accept returns the connection, and then says that there is none.
func (o *oneConn) Accept() (net.Conn, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.taken {
		return nil, net.ErrClosed
	}
	o.taken = true
	return lastConn{o.conn, o}, nil
}

// Close closes the connection, unless it was taken: then it has another owner.
func (o *oneConn) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.taken {
		return nil
	}
	o.taken = true
	return o.end()
}

func (o *oneConn) end() error {
	o.once.Do(func() { close(o.ended) })
	return o.conn.Close()
}

// Addr implements net.Listener.
func (o *oneConn) Addr() net.Addr { return o.conn.LocalAddr() }

// lastConn tells of its end.
type lastConn struct {
	net.Conn
	o *oneConn
}

// Close implements net.Conn.
func (c lastConn) Close() error { return c.o.end() }

// CloseWrite ends the sending side, where the connection can.
func (c lastConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.New("no half-close")
}
