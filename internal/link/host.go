package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// How often the host repeats its HELLO: soon at first, for a guest that is
// there; then seldom, for one that still boots.
const (
	firstRepeat = 50 * time.Millisecond
	lastRepeat  = time.Second
	// minRepeat spaces the answers to READY, of which stale ones may come in
	// any number.
	minRepeat = 20 * time.Millisecond
	// repeatPadding completes whatever handshake frame a guest may take a
	// piece of its former input for.
	repeatPadding = maxHandshake + headerLen + trailerLen
)

// Session is the host's end of a session. Its methods are safe for concurrent
// use.
type Session struct {
	conn  net.Conn
	m     *mux
	kick  chan struct{}
	nonce nonce
	hello Hello
	wg    sync.WaitGroup

	skipped uint64 // stale bytes before the session
}

// DialParams is what a host brings to a session.
type DialParams struct {
	Log *slog.Logger // nil: none

	versions [2]uint16 // tests only; zero: those of this build
}

// Dial makes a session over conn, which leads to the guest's port, and takes
// conn over: it is closed when Dial fails and when the session ends. Dial waits
// for as long as ctx allows for a guest that is still booting or paused. The
// error is a *VersionError when guest and host have no version in common.
func Dial(ctx context.Context, conn net.Conn, p DialParams) (*Session, error) {
	if p.Log == nil {
		p.Log = discard()
	}
	if p.versions == [2]uint16{} {
		p.versions = [2]uint16{MinVersion, MaxVersion}
	}
	d := &dialer{conn: conn, fr: newFrameReader(conn), versions: p.versions, nonce: newNonce()}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	ack, err := d.shake(ctx)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("link handshake with guest: %w", err)
	}
	p.Log.Debug("link session began", "agent_version", ack.hello.AgentVersion, "skipped_bytes", d.fr.skipped)

	kick := make(chan struct{}, 1)
	s := &Session{conn: conn, kick: kick, nonce: d.nonce, hello: ack.hello, skipped: d.fr.skipped}
	s.m = newMux(muxParams{host: true, tag: sessionTag(ack.version, ack.host, ack.guest), peerWindow: ack.window, kick: kick})
	s.wg.Go(func() { s.end(s.read(d.fr)) })
	s.wg.Go(func() { s.end(s.write()) })
	return s, nil
}

// dialer is the host's side of a handshake.
type dialer struct {
	conn     net.Conn
	fr       *frameReader
	versions [2]uint16
	nonce    nonce

	helloAt time.Time // when the last HELLO was sent
	ack     ackMsg    // the last that was answered with GO
	repeat  time.Duration
}

// shake runs the handshake to its end.
func (d *dialer) shake(ctx context.Context) (ackMsg, error) {
	d.repeat = firstRepeat
	if err := d.sendHello(maxFrame); err != nil {
		return ackMsg{}, err
	}
	next := d.helloAt.Add(d.repeat)
	for {
		if err := d.conn.SetReadDeadline(next); err != nil {
			return ackMsg{}, err
		}
		// Looked at after the deadline was set, so that it can't undo the one
		// that the end of ctx sets.
		if ctx.Err() != nil {
			return ackMsg{}, context.Cause(ctx)
		}
		f, err := d.receive()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if ctx.Err() != nil {
				return ackMsg{}, context.Cause(ctx)
			}
			if err := d.sendHello(repeatPadding); err != nil {
				return ackMsg{}, err
			}
			d.repeat = min(2*d.repeat, lastRepeat)
			next = d.helloAt.Add(d.repeat)
			continue
		case err != nil:
			return ackMsg{}, err
		}
		if f.typ == typeReady {
			next = d.helloAt.Add(minRepeat)
			d.repeat = firstRepeat
			continue
		}
		if up, err := d.take(f); up || err != nil {
			return d.ack, err
		}
	}
}

// receive returns the next frame of the handshake, or UP.
func (d *dialer) receive() (frame, error) {
	if d.ack.version == 0 {
		return d.fr.hunt()
	}
	// From an ACK on the borders are known, and UP is no handshake frame.
	f, err := d.fr.next()
	if errors.Is(err, errFraming) {
		// The guest may think that this session stands, and so leave a
		// repeated HELLO of it alone: begin another.
		d.ack, d.nonce = ackMsg{}, newNonce()
		return d.fr.hunt()
	}
	return f, err
}

// take acts on a frame. It reports true when the session has begun.
func (d *dialer) take(f frame) (bool, error) {
	switch f.typ {
	case typeAck:
		m, ok := parseAck(f.payload)
		if !ok || m.host != d.nonce || (d.ack.version != 0 && m.guest == d.ack.guest) {
			return false, nil
		}
		if m.version < d.versions[0] || m.version > d.versions[1] {
			return false, &VersionError{d.versions[0], d.versions[1], m.version, m.version}
		}
		d.ack = m
		return false, d.send(frame{typ: typeGo, payload: goMsg{m.host, m.guest}.encode()}, 0)
	case typeRefuse:
		m, ok := parseRefuse(f.payload)
		if !ok || m.host != d.nonce {
			return false, nil
		}
		return false, &VersionError{d.versions[0], d.versions[1], m.min, m.max}
	case typeUp:
		return d.ack.version != 0 && f.tag == sessionTag(d.ack.version, d.ack.host, d.ack.guest), nil
	}
	return false, nil
}

func (d *dialer) sendHello(pad int) error {
	d.helloAt = time.Now()
	m := helloMsg{min: d.versions[0], max: d.versions[1], nonce: d.nonce, window: Window}
	return d.send(frame{typ: typeHello, payload: m.encode()}, pad)
}

func (d *dialer) send(f frame, pad int) error {
	_, err := d.conn.Write(padding(pad, appendFrame(nil, f)))
	return err
}

// Hello returns what the guest agent said of itself.
func (s *Session) Hello() Hello {
	h := s.hello
	h.Features = append([]string(nil), h.Features...)
	return h
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.m.done }

// Err returns why the session ended, nil while it lives.
func (s *Session) Err() error { return s.m.failure() }

// OpenAPI opens a stream to the agent's HTTP server.
func (s *Session) OpenAPI(ctx context.Context) (*Stream, error) { return s.m.open(ctx, targetAPI) }

// OpenTCP opens a stream to a TCP port of the guest. The error is a
// *StatusError when the guest did not connect it.
func (s *Session) OpenTCP(ctx context.Context, port uint16) (*Stream, error) {
	return s.m.open(ctx, fmt.Sprintf("%s%d", targetTCP, port))
}

// OpenUnix opens a stream to a Unix socket of the guest, by the name that the
// agent gives it. Errors are as with OpenTCP.
func (s *Session) OpenUnix(ctx context.Context, name string) (*Stream, error) {
	return s.m.open(ctx, targetUnix+name)
}

// OpenUDP opens a flow to a UDP port of the guest: from its own port there to
// that one. That nothing listens is no error, as ever with UDP.
func (s *Session) OpenUDP(ctx context.Context, port uint16) (*Datagrams, error) {
	stream, err := s.m.open(ctx, fmt.Sprintf("%s%d", targetUDP, port))
	if err != nil {
		return nil, err
	}
	return newDatagrams(stream), nil
}

// Close ends the session and its streams, and waits for its goroutines.
func (s *Session) Close() error {
	s.end(ErrClosed)
	s.wg.Wait()
	return nil
}

// end ends the session for the reason err, which counts when it is the first.
func (s *Session) end(err error) {
	s.m.fail(err)
	_ = s.conn.Close()
}

// read hands incoming frames to the streams.
func (s *Session) read(fr *frameReader) error {
	for {
		f, err := fr.next()
		if err != nil {
			return fmt.Errorf("read from link: %w", err)
		}
		switch {
		case f.typ == typeReady:
			return ErrGuestRestarted
		case f.typ == typeAck && len(f.payload) > 18 && bytes.Equal(f.payload[2:18], s.nonce[:]):
			continue // a late answer to a repeated HELLO
		case f.handshake():
			return protocolError("frame of type %d within a session", f.typ)
		}
		if err := s.m.handle(f); err != nil {
			return err
		}
	}
}

// write sends what is due.
func (s *Session) write() error {
	buf := make([]byte, 0, ioBuffer)
	for {
		select {
		case <-s.m.done:
			return nil
		case <-s.kick:
		}
		if buf = s.m.fill(buf[:0]); len(buf) == 0 {
			continue
		}
		if _, err := s.conn.Write(buf); err != nil {
			return fmt.Errorf("write to link: %w", err)
		}
	}
}
