package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// How the guest waits where there is nothing to be waited for by event: for a
// port that does not open, and for one that reports EOF again and again.
const (
	firstBackoff = 20 * time.Millisecond
	lastBackoff  = 250 * time.Millisecond
)

// ListenParams is what a guest agent brings to the link.
type ListenParams struct {
	// Open opens the port. It is called again when the port breaks.
	Open func(ctx context.Context) (io.ReadWriteCloser, error)
	// Hello is told to the host; its Version is ignored.
	Hello Hello
	// DialTCP connects to a TCP port of this machine for the host; see
	// DialLocal. nil: such streams are denied.
	DialTCP func(ctx context.Context, port uint16) (net.Conn, error)
	// DialUDP makes a socket that is connected to a UDP port of this machine; see
	// DialLocalUDP. nil: such streams are denied.
	DialUDP func(ctx context.Context, port uint16) (*net.UDPConn, error)
	// Sockets are the paths of the Unix sockets that the host may connect to, by
	// name.
	Sockets map[string]string
	// Calls are what the host may call, by name; see Session.Call.
	Calls map[string]CallFunc
	Log   *slog.Logger // nil: none

	versions [2]uint16 // tests only; zero: those of this build
}

// Listener is the guest's end of the link: a net.Listener for the streams to
// the agent's API. It outlives sessions and hosts. Streams to ports and sockets, and
// calls, never show here; the Listener serves them itself.
type Listener struct {
	p      ListenParams
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	some chan struct{} // capacity 1: waiting has got one more
	mu   sync.Mutex
	// waiting is the API streams that wait for Accept.
	waiting []*Stream

	datagrams sync.Pool // *[]byte with room for one and its length
}

// acceptBacklog is how many API streams may wait for Accept: as many as a
// session can have, for they cost no more in here than elsewhere.
const acceptBacklog = MaxStreams

// Listen starts to serve the link. It fails only on bad parameters.
func Listen(p ListenParams) (*Listener, error) {
	if err := p.Hello.check(); err != nil {
		return nil, fmt.Errorf("listen on link: %w", err)
	}
	if p.Log == nil {
		p.Log = discard()
	}
	if p.versions == [2]uint16{} {
		p.versions = [2]uint16{MinVersion, MaxVersion}
	}
	l := &Listener{p: p, some: make(chan struct{}, 1)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.run)
	return l, nil
}

// Accept waits for the next stream to the API, over all sessions. The host is
// told that the stream is open only now.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		if s := l.next(); s != nil && s.accept() {
			return s, nil
		}
		select {
		case <-l.ctx.Done():
			return nil, fmt.Errorf("accept on link: %w", net.ErrClosed)
		case <-l.some:
		}
	}
}

// next takes the first of the waiting streams that the host has not given up.
func (l *Listener) next() *Stream {
	if l.ctx.Err() != nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting = slices.DeleteFunc(l.waiting, (*Stream).dead)
	if len(l.waiting) == 0 {
		return nil
	}
	s := l.waiting[0]
	l.waiting = slices.Delete(l.waiting, 0, 1)
	if len(l.waiting) > 0 {
		l.signal() // for another Accept
	}
	return s
}

// await puts s among the waiting streams, and tells whether there was room.
func (l *Listener) await(s *Stream) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) >= acceptBacklog {
		l.waiting = slices.DeleteFunc(l.waiting, (*Stream).dead)
	}
	if len(l.waiting) >= acceptBacklog {
		return false
	}
	l.waiting = append(l.waiting, s)
	l.signal()
	return true
}

func (l *Listener) signal() {
	select {
	case l.some <- struct{}{}:
	default:
	}
}

// Addr returns the name of the target that is accepted.
func (l *Listener) Addr() net.Addr { return Addr(targetAPI) }

// Close ends the session, closes the port, and waits for all goroutines.
func (l *Listener) Close() error {
	l.cancel()
	l.wg.Wait()
	return nil
}

// run opens the port again and again until Close.
func (l *Listener) run() {
	wait := firstBackoff
	for told := ""; l.ctx.Err() == nil; {
		port, err := l.p.Open(l.ctx)
		if err == nil {
			wait, told = firstBackoff, ""
			err = l.serve(port)
		}
		if l.ctx.Err() != nil {
			return
		}
		if msg := err.Error(); msg != told { // a lasting fault is told once
			told = msg
			l.p.Log.Warn("link port is not usable, trying again", "err", err)
		}
		_ = delay.For(l.ctx, wait)
		wait = min(2*wait, lastBackoff)
	}
}

// serve serves one opening of the port, to its end.
func (l *Listener) serve(port io.ReadWriteCloser) error {
	c := &guestPort{l: l, port: port, kick: make(chan struct{}, 1), ready: true}
	ctx, cancel := context.WithCancel(l.ctx)
	// Closing the port is what ends a blocked read or write.
	stop := context.AfterFunc(ctx, func() { _ = port.Close() })
	defer stop()
	var writeErr error
	var wg sync.WaitGroup
	wg.Go(func() {
		writeErr = c.write(ctx)
		cancel()
	})
	c.kick <- struct{}{}
	err := c.read(ctx)
	cancel()
	wg.Wait()
	c.endSession(fmt.Errorf("link port: %w", err))
	_ = port.Close()
	if writeErr != nil {
		err = writeErr
	}
	return err
}

// opened takes over a stream that the host opened.
func (l *Listener) opened(s *Stream) {
	if s.target == targetAPI {
		if !l.await(s) {
			s.answer(StatusBusy, "too many streams wait to be served")
		}
		return
	}
	if name, ok := parseCall(s.target); ok && l.p.Calls[name] != nil {
		l.wg.Go(func() { serveCall(l.ctx, s, l.p.Calls[name]) })
		return
	}
	dial, carry := l.way(s.target)
	if dial == nil {
		s.answer(StatusDenied, "this agent does not offer it")
		return
	}
	l.wg.Go(func() { forward(l.ctx, s, dial, carry) })
}

// way returns how a target beyond the agent is reached, nil when it is not
// offered.
func (l *Listener) way(target string) (dial func(context.Context) (net.Conn, error), carry func(*Stream, net.Conn)) {
	if port, ok := parsePort(target, targetTCP); ok && l.p.DialTCP != nil {
		return func(ctx context.Context) (net.Conn, error) { return l.p.DialTCP(ctx, port) }, carryTCP
	}
	if port, ok := parsePort(target, targetUDP); ok && l.p.DialUDP != nil {
		return func(ctx context.Context) (net.Conn, error) { return l.p.DialUDP(ctx, port) }, carryDatagrams(&l.datagrams)
	}
	if name, ok := strings.CutPrefix(target, targetUnix); ok && l.p.Sockets[name] != "" {
		return dialSocket(l.p.Sockets[name]), carrySocket
	}
	return nil, nil
}

// guestPort is one opening of the port.
type guestPort struct {
	l    *Listener
	port io.ReadWriteCloser
	kick chan struct{}

	mu      sync.Mutex
	ready   bool    // READY is due
	answer  []byte  // ACK or REFUSE that is due
	pending *ackMsg // the ACK that GO has to match
	window  uint32  // of the host that pending answers
	cur     *mux
	nonce   nonce // of the host of cur
}

// read acts on what the host sends until the port breaks.
func (c *guestPort) read(ctx context.Context) error {
	fr := newFrameReader(c.port)
	synced, wait := false, time.Duration(0)
	for ctx.Err() == nil {
		var f frame
		var err error
		if synced {
			f, err = fr.next()
		} else {
			f, err = fr.hunt()
		}
		switch {
		case err == nil:
			wait = 0
			if synced, err = c.take(f, synced); err == nil {
				continue
			}
			c.lost(err)
			synced = false
		case errors.Is(err, errFraming):
			c.lost(err)
			synced = false
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrNoProgress):
			// The host is away. Port waits for it by event in the next read;
			// anything else reports EOF over and over.
			c.endSession(ErrHostAway)
			synced = false
			_ = delay.For(ctx, wait)
			wait = min(max(2*wait, firstBackoff), lastBackoff)
		default:
			return fmt.Errorf("read from port: %w", err)
		}
	}
	return ctx.Err()
}

// take acts on one frame, and returns whether the borders of the next are
// known.
func (c *guestPort) take(f frame, synced bool) (bool, error) {
	switch f.typ {
	case typeHello:
		if m, ok := parseHello(f.payload); ok {
			return c.hello(m) && synced, nil
		}
		return synced, nil
	case typeGo:
		if m, ok := parseGo(f.payload); ok && c.begin(m) {
			return true, nil
		}
		return synced, nil
	}
	if f.handshake() || !synced {
		return synced, nil
	}
	return true, c.cur.handle(f)
}

// hello answers a HELLO. It returns true when that was a late repetition for
// the session that stands, and changes nothing.
func (c *guestPort) hello(m helloMsg) bool {
	c.mu.Lock()
	standing := c.cur != nil && c.nonce == m.nonce
	c.mu.Unlock()
	if standing {
		return true
	}
	c.endSession(ErrHostRestarted)

	c.mu.Lock()
	defer c.mu.Unlock()
	ours := c.l.p.versions
	version := min(m.max, ours[1])
	if version < max(m.min, ours[0]) {
		c.l.p.Log.Warn("host speaks no link version of this agent, use a matching kernel pack",
			"host_min", m.min, "host_max", m.max, "agent_min", ours[0], "agent_max", ours[1])
		c.pending = nil
		c.answer = appendFrame(nil, frame{typ: typeRefuse, payload: refuseMsg{ours[0], ours[1], m.nonce}.encode()})
		c.wake()
		return false
	}
	if c.pending == nil || c.pending.host != m.nonce {
		c.pending = &ackMsg{version: version, host: m.nonce, guest: newNonce(), window: Window, hello: c.l.p.Hello}
		c.window = m.window
	}
	c.answer = appendFrame(nil, frame{typ: typeAck, payload: c.pending.encode()})
	c.wake()
	return false
}

// begin starts the session that GO asks for, if it is the one agreed on.
func (c *guestPort) begin(m goMsg) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending == nil || c.pending.host != m.host || c.pending.guest != m.guest {
		return false
	}
	c.cur = newMux(muxParams{
		tag: sessionTag(c.pending.version, m.host, m.guest), peerWindow: c.window, kick: c.kick, opened: c.l.opened,
	})
	c.nonce, c.pending, c.answer = m.host, nil, nil
	c.wake()
	c.l.p.Log.Debug("link session began")
	return true
}

// lost ends the session because its input makes no sense, and asks the host for
// a new one.
func (c *guestPort) lost(err error) {
	c.endSession(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending, c.answer, c.ready = nil, nil, true
	c.wake()
}

// endSession ends the session that stands, if one does.
func (c *guestPort) endSession(err error) {
	c.mu.Lock()
	cur := c.cur
	c.cur = nil
	c.mu.Unlock()
	if cur != nil {
		cur.fail(err)
		c.l.p.Log.Debug("link session ended", "reason", err)
	}
}

func (c *guestPort) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// write sends what is due until ctx ends or the port breaks.
func (c *guestPort) write(ctx context.Context) error {
	buf := make([]byte, 0, ioBuffer)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.kick:
		}
		if buf = c.fill(buf[:0]); len(buf) == 0 {
			continue
		}
		if _, err := c.port.Write(buf); err != nil {
			return fmt.Errorf("write to port: %w", err)
		}
	}
}

// fill puts together what is due: the handshake's frames before the session's.
func (c *guestPort) fill(buf []byte) []byte {
	c.mu.Lock()
	ready, answer, cur := c.ready, c.answer, c.cur
	c.ready, c.answer = false, nil
	c.mu.Unlock()
	if ready {
		buf = append(buf, make([]byte, maxFrame)...)
		buf = appendFrame(buf, frame{typ: typeReady})
	}
	buf = append(buf, answer...)
	if cur != nil {
		buf = cur.fill(buf)
	}
	return buf
}
