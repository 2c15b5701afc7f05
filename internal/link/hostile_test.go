package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
)

// rawGuest is a guest that speaks for itself.
type rawGuest struct {
	t    testing.TB
	port io.ReadWriteCloser
	fr   *frameReader
	tag  uint64
}

// answer makes a session with the host that dials.
func answer(t testing.TB, v *vport) *rawGuest {
	port, err := v.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g := &rawGuest{t: t, port: port, fr: newFrameReader(port)}
	t.Cleanup(func() { _ = port.Close() })
	f := g.await(typeHello)
	m, ok := parseHello(f.payload)
	if !ok {
		t.Fatal("bad hello")
	}
	guest := newNonce()
	g.send(frame{typ: typeAck, payload: ackMsg{version: 1, host: m.nonce, guest: guest, window: Window}.encode()})
	g.await(typeGo)
	g.tag = sessionTag(1, m.nonce, guest)
	g.send(frame{typ: typeUp, tag: g.tag})
	return g
}

func (g *rawGuest) await(typ uint8) frame {
	for {
		f, err := g.fr.hunt()
		if errors.Is(err, io.EOF) {
			<-time.After(time.Millisecond)
			continue
		}
		if err != nil {
			g.t.Fatal(err)
		}
		if f.typ == typ {
			return f
		}
	}
}

func (g *rawGuest) send(f frame) {
	f.tag = g.tag
	_, _ = g.port.Write(appendFrame(nil, f)) // the host may be gone: that is the point
}

// hostile returns a session with a guest that speaks for itself, and n streams
// that it has accepted.
func hostile(t testing.TB, n int) (*Session, *rawGuest, []*Stream) {
	t.Helper()
	ctx, v := testenv.Context(t), newVport(t)
	conn := v.connect()
	made := make(chan *rawGuest)
	go func() { made <- answer(t, v) }()
	s, err := Dial(ctx, conn, DialParams{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	g := <-made
	streams := make([]*Stream, n)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			c, err := s.OpenAPI(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			streams[c.id-1] = c
		})
	}
	for seen := 0; seen < n; {
		f, err := g.fr.next()
		if err != nil {
			t.Fatal(err)
		}
		if f.typ == typeOpen {
			seen++
			g.send(frame{typ: typeStatus, stream: f.stream, payload: []byte{0}})
		}
	}
	wg.Wait()
	return s, g, streams
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestHostileGuestMemory lets a guest send as much as it may, in the portions
// that cost most, on streams that nobody reads.
func TestHostileGuestMemory(t *testing.T) {
	testenv.CheckGoroutines(t)
	const n = 20
	s, g, streams := hostile(t, n)
	before := heap()
	for _, c := range streams {
		var b []byte
		for range Window / 8 {
			b = appendFrame(b, frame{typ: typeData, stream: c.id, tag: g.tag, payload: make([]byte, 8)})
		}
		_, _ = g.port.Write(b)
	}
	for _, c := range streams {
		waitBuffered(t, c, Window)
	}
	if cost := (heap() - before) / n; cost > Window+2*pieceLen {
		t.Errorf("a stream costs %d bytes, want at most %d", cost, Window+2*pieceLen)
	}
	g.send(frame{typ: typeData, stream: 1, payload: []byte("x")})
	<-s.Done()
	if !errors.Is(s.Err(), ErrProtocol) {
		t.Errorf("a byte beyond the window: %v, want ErrProtocol", s.Err())
	}
	runtime.KeepAlive(streams)
}

func waitBuffered(t testing.TB, c *Stream, n int) {
	t.Helper()
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for c.rbuf.n < n && c.rerr == nil {
		c.rcond.Wait()
	}
	if c.rbuf.n != n {
		t.Fatalf("%d bytes buffered, %v", c.rbuf.n, c.rerr)
	}
}

func TestHostileGuestLosesSession(t *testing.T) {
	for name, f := range map[string]frame{
		"opens a stream":      {typ: typeOpen, stream: 2, payload: encodePreface(targetAPI)},
		"unknown stream":      {typ: typeData, stream: 9, payload: []byte("x")},
		"no stream":           {typ: typeData, payload: []byte("x")},
		"second status":       {typ: typeStatus, stream: 1, payload: []byte{0}},
		"window overflow":     {typ: typeWindow, stream: 1, payload: windowPayload(1<<32 - 1)},
		"short window":        {typ: typeWindow, stream: 1, payload: []byte{1}},
		"unknown type":        {typ: 99, stream: 1},
		"another session":     {typ: typeFin, stream: 1, tag: 4},
		"handshake in a live": {typ: typeHello, payload: helloMsg{1, 1, nonce{}, Window}.encode()},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			s, g, streams := hostile(t, 1)
			if f.handshake() {
				g.tag = 0
			}
			g.tag += f.tag // which send would overwrite
			g.send(f)
			<-s.Done()
			if err := s.Err(); !errors.Is(err, ErrProtocol) {
				t.Errorf("%v, want ErrProtocol", err)
			}
			if _, err := streams[0].Read(make([]byte, 1)); !errors.Is(err, ErrProtocol) {
				t.Errorf("stream: %v, want ErrProtocol", err)
			}
		})
	}
}

func TestHostileGuestStopsReading(t *testing.T) {
	testenv.CheckGoroutines(t)
	s, _, streams := hostile(t, 3)
	for _, c := range streams {
		_ = c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := c.Write(make([]byte, 4*(Window+sendBuffer)))
		if err == nil || n > Window+sendBuffer {
			t.Errorf("%d bytes went to a guest that reads nothing, %v", n, err)
		}
		if err := c.Close(); err != nil { // must not wait for the guest
			t.Error(err)
		}
	}
	// Streams that still have bytes to deliver count, and are bounded.
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer giveUp()
	for range MaxStreams - len(streams) {
		wg.Go(func() {
			if _, err := s.OpenAPI(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("open: %v, want canceled", err)
			}
		})
	}
	waitStreams(t, s.m, MaxStreams)
	if _, err := s.OpenAPI(ctx); !errors.Is(err, ErrStreams) {
		t.Errorf("one more stream: %v, want ErrStreams", err)
	}
}

// TestHostileHandshake floods a dialing host with garbage that looks right.
func TestHostileHandshake(t *testing.T) {
	testenv.CheckGoroutines(t)
	v := newVport(t)
	conn := v.connect()
	port, err := v.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	flood := bytes.Repeat(forgery(nil), 64)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer port.Close()
	wg.Go(func() {
		for {
			if _, err := port.Write(flood); err != nil {
				return
			}
		}
	})
	wg.Go(func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{port}) })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, conn, DialParams{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want deadline exceeded", err)
	}
}
