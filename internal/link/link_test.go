package link

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/nettest"

	"github.com/hutch-run/hutch/internal/testenv"
)

func testHello() Hello { return Hello{AgentVersion: "v1.2.3", Features: []string{"exec", "tcp"}} }

// listen starts a guest on v whose API echoes, and which reaches dial.
func listen(t testing.TB, v *vport, dial func(context.Context, uint16) (net.Conn, error)) *Listener {
	t.Helper()
	l, err := Listen(ListenParams{Open: v.open, Hello: testHello(), DialTCP: dial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// serveEcho echoes on every API stream until the listener ends.
func serveEcho(t testing.TB, l *Listener) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if _, err := io.Copy(struct{ io.Writer }{c}, c); err == nil {
					_ = c.(*Stream).CloseWrite()
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
}

func dial(t testing.TB, ctx context.Context, v *vport) *Session {
	t.Helper()
	s, err := Dial(ctx, v.connect(), DialParams{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func openAPI(t testing.TB, ctx context.Context, s *Session) *Stream {
	t.Helper()
	c, err := s.OpenAPI(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// roundTrip sends msg through an echoing stream and wants it back, then EOF.
func roundTrip(c *Stream, msg []byte) error {
	errc := make(chan error, 1)
	go func() {
		_, err := c.Write(msg)
		if err == nil {
			err = c.CloseWrite()
		}
		errc <- err
	}()
	got, err := io.ReadAll(c)
	if werr := <-errc; werr != nil {
		return werr
	}
	if err != nil {
		return err
	}
	if sha256.Sum256(got) != sha256.Sum256(msg) {
		return fmt.Errorf("%d bytes came back altered (%d)", len(msg), len(got))
	}
	return nil
}

func TestHelloIsTold(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	listen(t, v, nil)
	want := testHello()
	want.Version = MaxVersion
	if diff := cmp.Diff(want, dial(t, ctx, v).Hello()); diff != "" {
		t.Error(diff)
	}
}

func TestNetConn(t *testing.T) {
	testenv.CheckGoroutines(t)
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		v := newVport(t)
		l, err := Listen(ListenParams{Open: v.open})
		if err != nil {
			return nil, nil, nil, err
		}
		s, err := Dial(t.Context(), v.connect(), DialParams{})
		if err != nil {
			return nil, nil, nil, err
		}
		accepted := make(chan net.Conn, 1)
		go func() {
			c, _ := l.Accept()
			accepted <- c
		}()
		c1, err = s.OpenAPI(t.Context())
		if err != nil {
			return nil, nil, nil, err
		}
		c2 = <-accepted
		return c1, c2, func() {
			_ = c1.Close()
			_ = c2.Close()
			_ = s.Close()
			_ = l.Close()
		}, nil
	})
}

func TestHalfClose(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	s := dial(t, ctx, v)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		in, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		// The other direction lives on, for more than a window.
		_, _ = c.Write(append(in, make([]byte, 3*Window)...))
	})
	c := openAPI(t, ctx, s)
	defer c.Close()
	_, _ = c.Write([]byte("question"))
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite: %v, want EPIPE", err)
	}
	out, err := io.ReadAll(c)
	if err != nil || len(out) != len("question")+3*Window || !strings.HasPrefix(string(out), "question") {
		t.Errorf("answer of %d bytes, %v", len(out), err)
	}
}

// pair returns both ends of one API stream.
func pair(t testing.TB) (*Session, *Stream, *Stream) {
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	s := dial(t, ctx, v)
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	c := openAPI(t, ctx, s)
	return s, c, (<-accepted).(*Stream)
}

func TestReset(t *testing.T) {
	testenv.CheckGoroutines(t)
	_, host, guest := pair(t)
	if _, err := host.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	host.Reset()
	_, err := io.ReadAll(guest)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want ECONNRESET", err)
	}
	if _, err := guest.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("write: %v, want ECONNRESET", err)
	}
	if _, err := host.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("own read: %v, want closed", err)
	}
}

func TestCloseDeliversAndStopsPeer(t *testing.T) {
	testenv.CheckGoroutines(t)
	s, host, guest := pair(t)
	if _, err := host.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	if err := host.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(guest); err != nil || string(got) != "last words" {
		t.Errorf("got %q, %v", got, err)
	}
	// More than any buffer holds: only the other side's stop can end it.
	if _, err := guest.Write(make([]byte, 2*(Window+sendBuffer))); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write to a closed peer: %v, want EPIPE", err)
	}
	_ = guest.Close()
	waitStreams(t, s.m, 0)
	waitStreams(t, guest.m, 0)
}

// waitStreams waits until m knows n streams.
func waitStreams(t testing.TB, m *mux, n int) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		m.mu.Lock()
		got := len(m.streams)
		m.mu.Unlock()
		if got == n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d streams are left, want %d", got, n)
		}
		<-time.After(time.Millisecond)
	}
}

func TestSessionLossIsNoEOF(t *testing.T) {
	testenv.CheckGoroutines(t)
	s, host, guest := pair(t)
	if _, err := guest.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(host, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	if _, err := host.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || !errors.Is(err, ErrClosed) {
		t.Errorf("read after the session: %v, want ErrClosed", err)
	}
	if _, err := s.OpenAPI(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("open after the session: %v, want ErrClosed", err)
	}
}

func TestBulkDigest(t *testing.T) {
	testenv.CheckGoroutines(t)
	size := int64(1 << 30)
	if testing.Short() {
		size = 128 << 20
	}
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	serveEcho(t, l)
	c := openAPI(t, ctx, dial(t, ctx, v))
	defer c.Close()
	in, out := sha256.New(), sha256.New()
	errc := make(chan error, 1)
	go func() {
		src := io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
		_, err := io.Copy(io.MultiWriter(in, c), src)
		if err == nil {
			err = c.CloseWrite()
		}
		errc <- err
	}()
	n, err := io.Copy(out, c)
	if werr := <-errc; err != nil || werr != nil || n != size {
		t.Fatalf("%d of %d bytes, %v, %v", n, size, err, werr)
	}
	if string(in.Sum(nil)) != string(out.Sum(nil)) {
		t.Error("digests differ")
	}
}

func TestParallelStreams(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	serveEcho(t, l)
	s := dial(t, ctx, v)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			c, err := s.OpenAPI(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			msg := make([]byte, 1+rand.IntN(300<<10))
			_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(msg)
			if err := roundTrip(c, msg); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	waitStreams(t, s.m, 0)
}

func TestTCPTargets(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	srv, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = srv.Close() })
	wg.Go(func() {
		for {
			c, err := srv.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	open := uint16(srv.Addr().(*net.TCPAddr).Port)
	const odd = 7
	listen(t, v, func(ctx context.Context, port uint16) (net.Conn, error) {
		if port == odd {
			return nil, errors.New("no\x1b[31mway")
		}
		return DialLocal(ctx, port)
	})
	s := dial(t, ctx, v)
	c, err := s.OpenTCP(ctx, open)
	if err != nil {
		t.Fatal(err)
	}
	if err := roundTrip(c, make([]byte, 1<<20)); err != nil {
		t.Error(err)
	}
	_ = c.Close()

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	shut := uint16(closed.Addr().(*net.TCPAddr).Port)
	_ = closed.Close()
	for port, want := range map[uint16]Status{shut: StatusRefused, odd: StatusUnreachable} {
		_, err := s.OpenTCP(ctx, port)
		var status *StatusError
		if !errors.As(err, &status) || status.Status != want {
			t.Errorf("port %d: %v, want %v", port, err, want)
		}
		if strings.Contains(err.Error(), "\x1b") {
			t.Errorf("port %d: control characters of the guest come through: %q", port, err)
		}
	}
	waitStreams(t, s.m, 0)
}

func TestTCPDenied(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	listen(t, v, nil)
	s := dial(t, ctx, v)
	for _, target := range []string{"tcp:80", "tcp:0", "tcp:x", "udp:1", "ap"} {
		_, err := s.m.open(ctx, target)
		var status *StatusError
		if !errors.As(err, &status) || status.Status != StatusDenied {
			t.Errorf("%s: %v, want denied", target, err)
		}
	}
}

func TestOpenGivesUpWithContext(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil) // nobody accepts
	s := dial(t, ctx, v)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := s.OpenAPI(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want deadline exceeded", err)
	}
	waitStreams(t, s.m, 0)
	serveEcho(t, l)
	if err := roundTrip(openAPI(t, ctx, s), []byte("later")); err != nil {
		t.Error(err)
	}
}

func TestVersionMismatch(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l, err := Listen(ListenParams{Open: v.open, versions: [2]uint16{MaxVersion + 1, MaxVersion + 2}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = Dial(ctx, v.connect(), DialParams{})
	var ve *VersionError
	if !errors.As(err, &ve) || *ve != (VersionError{MinVersion, MaxVersion, MaxVersion + 1, MaxVersion + 2}) {
		t.Fatalf("%v, want a version error", err)
	}
	s, err := Dial(ctx, v.connect(), DialParams{versions: [2]uint16{1, MaxVersion + 1}})
	if err != nil {
		t.Fatalf("the guest must still be there for a host that fits: %v", err)
	}
	if got := s.Hello().Version; got != MaxVersion+1 {
		t.Errorf("version %d, want %d", got, MaxVersion+1)
	}
	_ = s.Close()
}

func TestOlderVersionsOnEitherSide(t *testing.T) {
	testenv.CheckGoroutines(t)
	old, all := [2]uint16{1, 1}, [2]uint16{MinVersion, MaxVersion}
	for _, tc := range []struct {
		host, guest [2]uint16
		want        uint16
	}{{all, old, 1}, {old, all, 1}, {all, all, MaxVersion}} {
		ctx, v := testenv.Context(t), newVport(t)
		l, err := Listen(ListenParams{Open: v.open, versions: tc.guest})
		if err != nil {
			t.Fatal(err)
		}
		serveEcho(t, l)
		s, err := Dial(ctx, v.connect(), DialParams{versions: tc.host})
		if err != nil {
			t.Fatalf("host %v, guest %v: %v", tc.host, tc.guest, err)
		}
		if err := roundTrip(openAPI(t, ctx, s), []byte("hello")); err != nil || s.Hello().Version != tc.want {
			t.Errorf("host %v, guest %v: version %d, %v", tc.host, tc.guest, s.Hello().Version, err)
		}
		_ = s.Close()
		_ = l.Close()
	}
}

func TestDialWaitsForGuest(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	if _, err := Dial(short, v.connect(), DialParams{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("dial without a guest: %v, want deadline exceeded", err)
	}
	got := make(chan error, 1)
	go func() {
		s, err := Dial(ctx, v.connect(), DialParams{})
		if err == nil {
			_ = s.Close()
		}
		got <- err
	}()
	// The port is filled to the brim before the guest opens it.
	v.mu.Lock()
	for len(v.toGuest) < vportBuffer {
		v.cond.Wait()
	}
	v.mu.Unlock()
	listen(t, v, nil)
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestHostAwayDoesNotSpin(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	l := listen(t, v, nil)
	serveEcho(t, l)
	<-time.After(time.Second) // the host stays away for that long
	v.mu.Lock()
	eofs := v.eofs
	v.mu.Unlock()
	if eofs > 12 {
		t.Errorf("guest asked %d times in a second for a host that is away", eofs)
	}
	if err := roundTrip(openAPI(t, ctx, dial(t, ctx, v)), []byte("there")); err != nil {
		t.Error(err)
	}
}
