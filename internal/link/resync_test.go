package link

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"github.com/hutch-run/hutch/internal/testenv"
)

// recorder keeps what a host sends.
type recorder struct {
	net.Conn
	mu   sync.Mutex
	sent []byte
}

func (r *recorder) Write(p []byte) (int, error) {
	n, err := r.Conn.Write(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.sent) < 256<<10 {
		r.sent = append(r.sent, p[:n]...)
	}
	return n, err
}

// forgery is what somebody who knows everything of the past, and the format,
// would send as user data: a recorded link, and handshakes made up.
func forgery(recorded []byte) []byte {
	var made nonce
	b := append([]byte(nil), recorded...)
	b = appendFrame(b, frame{typ: typeHello, payload: helloMsg{MinVersion, MaxVersion, made, Window}.encode()})
	b = appendFrame(b, frame{typ: typeGo, payload: goMsg{made, made}.encode()})
	b = appendFrame(b, frame{typ: typeOpen, stream: 1, tag: sessionTag(MaxVersion, made, made), payload: encodePreface(targetAPI)})
	b = appendFrame(b, frame{typ: typeReady})
	b = appendFrame(b, frame{typ: typeAck, payload: ackMsg{version: 1, host: made, guest: made, window: Window}.encode()})
	return appendFrame(b, frame{typ: typeUp, tag: sessionTag(MaxVersion, made, made)})
}

func TestHostKilled(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	serveEcho(t, l)
	payload := forgery(nil)
	for i := range 100 {
		rec := &recorder{Conn: v.connect()}
		s, err := Dial(ctx, rec, DialParams{})
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if err := roundTrip(openAPI(t, ctx, s), bytes.Repeat(payload, 3)); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if i%5 == 0 {
			rec.mu.Lock()
			payload = forgery(rec.sent)
			rec.mu.Unlock()
		}
		// Die in the middle of a transfer, both directions full of it.
		c := openAPI(t, ctx, s)
		enough := rand.IntN(64 << 10)
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				if _, err := c.Write(payload); err != nil {
					return
				}
			}
		})
		_, _ = io.CopyN(io.Discard, c, int64(enough))
		_ = rec.Close()
		_ = s.Close()
		wg.Wait()
		if i%10 == 9 { // and sometimes the guest gets to know
			v.leave()
		}
	}
}

func TestGuestRestarted(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	for i := range 20 {
		l := listen(t, v, nil)
		serveEcho(t, l)
		s := dial(t, ctx, v)
		c := openAPI(t, ctx, s)
		if err := roundTrip(c, forgery(nil)); err != nil {
			t.Fatalf("guest %d: %v", i, err)
		}
		if i%2 == 0 { // every other time in the middle of a transfer
			c := openAPI(t, ctx, s)
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() {
				for {
					if _, err := c.Write(forgery(nil)); err != nil {
						return
					}
				}
			})
			_, _ = io.CopyN(io.Discard, c, int64(rand.IntN(256<<10)))
		}
		_ = l.Close()
		next := listen(t, v, nil)
		select {
		case <-s.Done():
		case <-ctx.Done():
			t.Fatalf("guest %d: the host did not notice the restart", i)
		}
		if i%2 == 1 && !errors.Is(s.Err(), ErrGuestRestarted) {
			t.Errorf("guest %d: session ended with %v, want ErrGuestRestarted", i, s.Err())
		}
		_ = s.Close()
		_ = next.Close()
	}
}

// TestForgeryWithoutBorders gives a guest that has just started what a killed
// predecessor left unread: user data that imitates a host.
func TestForgeryWithoutBorders(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	v.mu.Lock()
	v.toGuest = forgery(forgery(nil))[7:]
	v.mu.Unlock()
	l := listen(t, v, nil)
	accepted := make(chan net.Conn)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	s := dial(t, ctx, v)
	c := openAPI(t, ctx, s)
	first := (<-accepted).(*Stream)
	if first.m.tag != s.m.tag {
		t.Error("user data began a session")
	}
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(first, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// TestForgeryInCutFrame has a host die within a frame whose payload imitates
// its successor.
func TestForgeryInCutFrame(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	serveEcho(t, l)
	conn := v.connect()
	s, err := Dial(ctx, conn, DialParams{})
	if err != nil {
		t.Fatal(err)
	}
	payload := bytes.Repeat(forgery(nil), 40)
	whole := appendFrame(nil, frame{typ: typeData, stream: 1, tag: s.m.tag, payload: payload})
	if _, err := conn.Write(whole[:len(whole)-len(payload)/2]); err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	for len(v.toGuest) > 0 {
		v.cond.Wait()
	}
	v.mu.Unlock()
	_ = s.Close()
	next := dial(t, ctx, v)
	if err := roundTrip(openAPI(t, ctx, next), []byte("fine")); err != nil {
		t.Error(err)
	}
}

// TestCutFrameIsNotSearched is the same at the reader: what is in the cut frame
// is never offered, the HELLO behind the padding is.
func TestCutFrameIsNotSearched(t *testing.T) {
	var real nonce
	real[0] = 1
	cut := appendFrame(nil, frame{typ: typeData, stream: 1, tag: 2, payload: bytes.Repeat(forgery(nil), 40)})
	for _, n := range []int{1, 10, headerLen, headerLen + 1, len(cut) / 2, len(cut) - 1} {
		hello := appendFrame(nil, frame{typ: typeHello, payload: helloMsg{1, 1, real, Window}.encode()})
		fr := newFrameReader(bytes.NewReader(append(append([]byte(nil), cut[:n]...), padding(maxFrame, hello)...)))
		if _, err := fr.next(); !errors.Is(err, errFraming) {
			t.Fatalf("frame cut after %d bytes: %v, want errFraming", n, err)
		}
		f, err := fr.hunt()
		if err != nil {
			t.Fatal(err)
		}
		if m, ok := parseHello(f.payload); f.typ != typeHello || !ok || m.nonce != real {
			t.Errorf("frame cut after %d bytes: user data was taken for a handshake", n)
		}
	}
}

func TestCloseInHandshakeOfSession(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	serveEcho(t, l)
	for i := range 50 { // dialers that give up at any point must leave nothing behind
		short, cancel := context.WithCancel(ctx)
		conn := v.connect()
		done := make(chan struct{})
		go func() {
			defer close(done)
			if s, err := Dial(short, conn, DialParams{}); err == nil {
				_ = s.Close()
			}
		}()
		for range i * 10 {
			_ = sha256.Sum256(make([]byte, 1<<10))
		}
		cancel()
		<-done
	}
	if err := roundTrip(openAPI(t, ctx, dial(t, ctx, v)), []byte("fine")); err != nil {
		t.Error(err)
	}
}
