package link

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
)

// serveSocket has serve answer the connections to a Unix socket, and returns a
// session with a guest that offers it as "here".
func serveSocket(t *testing.T, serve func(*net.UnixConn)) *Session {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	srv, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = srv.Close() })
	wg.Go(func() {
		for {
			c, err := srv.AcceptUnix()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	ctx, v := testenv.Context(t), newVport(t)
	l, err := Listen(ListenParams{Open: v.open, Sockets: map[string]string{"here": path, "gone": path + "x"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return dial(t, ctx, v)
}

func openUnix(t testing.TB, s *Session) *Stream {
	t.Helper()
	c, err := s.OpenUnix(testenv.Context(t), "here")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestUnixTargets(t *testing.T) {
	testenv.CheckGoroutines(t)
	s := serveSocket(t, func(c *net.UnixConn) { _, _ = io.Copy(c, c) })
	c := openUnix(t, s)
	if err := roundTrip(c, make([]byte, 1<<20)); err != nil {
		t.Error(err)
	}
	_ = c.Close()
	for name, want := range map[string]Status{"gone": StatusRefused, "other": StatusDenied, "": StatusDenied, "/etc/passwd": StatusDenied} {
		_, err := s.OpenUnix(testenv.Context(t), name)
		var status *StatusError
		if !errors.As(err, &status) || status.Status != want {
			t.Errorf("%q: %v, want %v", name, err, want)
		}
	}
	waitStreams(t, s.m, 0)
}

// TestUnixHalfClose ends the host's side first and the guest's side first, many
// times.
func TestUnixHalfClose(t *testing.T) {
	testenv.CheckGoroutines(t)
	s := serveSocket(t, func(c *net.UnixConn) {
		first := make([]byte, 1)
		_, _ = io.ReadFull(c, first)
		if first[0] == 'g' {
			_, _ = c.Write([]byte("said"))
			_ = c.CloseWrite()
			rest, _ := io.ReadAll(c)
			if string(rest) != "after" {
				t.Errorf("the guest heard %q", rest)
			}
			return
		}
		rest, _ := io.ReadAll(c)
		_, _ = c.Write(append([]byte("heard "), rest...))
	})
	for i := range 200 {
		c := openUnix(t, s)
		if i%2 == 0 {
			_, _ = c.Write([]byte("hx"))
			_ = c.CloseWrite()
			if b, err := io.ReadAll(c); err != nil || string(b) != "heard x" {
				t.Fatalf("%d: %q, %v", i, b, err)
			}
		} else {
			_, _ = c.Write([]byte("g"))
			if b, err := io.ReadAll(c); err != nil || string(b) != "said" {
				t.Fatalf("%d: %q, %v", i, b, err)
			}
			if _, err := c.Write([]byte("after")); err != nil {
				t.Fatalf("%d: write behind the guest's end: %v", i, err)
			}
			_ = c.CloseWrite()
		}
		_ = c.Close()
	}
	waitStreams(t, s.m, 0)
}

// TestUnixPeerLeavesInputBehind: a peer that answers and closes without reading
// what is still coming has its whole answer arrive, as on one machine.
func TestUnixPeerLeavesInputBehind(t *testing.T) {
	testenv.CheckGoroutines(t)
	answer := make([]byte, 1<<20)
	for i := range answer {
		answer[i] = byte(rand.Uint32())
	}
	s := serveSocket(t, func(c *net.UnixConn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		_, _ = c.Write(answer)
	})
	for range 20 {
		c := openUnix(t, s)
		stopped := make(chan error, 1)
		go func() {
			for {
				if _, err := c.Write(make([]byte, 4<<10)); err != nil {
					stopped <- err
					return
				}
			}
		}()
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, answer) {
			t.Fatalf("%d of %d bytes, %v", len(got), len(answer), err)
		}
		if err := <-stopped; !errors.Is(err, syscall.EPIPE) {
			t.Errorf("writing ended with %v, want EPIPE", err)
		}
		_ = c.Close()
	}
	waitStreams(t, s.m, 0)
}

// TestUnixHostLeavesOutputBehind: what the host wrote before it closed arrives,
// and the peer's writes end.
func TestUnixHostLeavesOutputBehind(t *testing.T) {
	testenv.CheckGoroutines(t)
	heard := make(chan string, 1)
	s := serveSocket(t, func(c *net.UnixConn) {
		for {
			if _, err := c.Write(make([]byte, 4<<10)); err != nil {
				break
			}
		}
		rest, _ := io.ReadAll(c)
		heard <- string(rest)
	})
	c := openUnix(t, s)
	_, _ = io.ReadFull(c, make([]byte, 100))
	_, _ = c.Write([]byte("the last words"))
	_ = c.Close()
	if got := <-heard; got != "the last words" {
		t.Errorf("the guest heard %q", got)
	}
	c = openUnix(t, s)
	c.Reset()
	if got := <-heard; got != "" {
		t.Errorf("of a reset stream the guest heard %q", got)
	}
	waitStreams(t, s.m, 0)
}

// flows returns a session with a guest that reaches the UDP ports of this
// machine.
func flows(t *testing.T) *Session {
	ctx, v := testenv.Context(t), newVport(t)
	l, err := Listen(ListenParams{Open: v.open, DialUDP: DialLocalUDP})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return dial(t, ctx, v)
}

// echoUDP sends datagrams back, with the sender's port before them when asked
// to by one of four bytes.
func echoUDP(t *testing.T, address string) uint16 {
	t.Helper()
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Skipf("no %s here: %v", address, err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = c.Close() })
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if string(buf[:n]) == "who?" {
				_, _ = c.WriteTo([]byte(from.String()), from)
				continue
			}
			_, _ = c.WriteTo(buf[:n], from)
		}
	})
	return uint16(c.LocalAddr().(*net.UDPAddr).Port)
}

func TestUDPTargets(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0", "127.0.0.77:0"} {
		t.Run(address, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			port := echoUDP(t, address)
			s := flows(t)
			c, err := s.OpenUDP(testenv.Context(t), port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			late := time.Now().Add(20 * time.Second)
			_ = c.SetReadDeadline(late)
			buf := make([]byte, 64<<10)
			for _, n := range []int{1, 0, 4000, 65000, 1472} {
				msg := bytes.Repeat([]byte{byte(n)}, n)
				if _, err := c.Write(msg); err != nil {
					t.Fatal(err)
				}
				if got, err := c.Read(buf); err != nil || !bytes.Equal(buf[:got], msg) {
					t.Fatalf("%d bytes: %d came back, %v", n, got, err)
				}
			}
			var froms []string // one flow, one port
			for range 3 {
				_, _ = c.Write([]byte("who?"))
				n, err := c.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				froms = append(froms, string(buf[:n]))
			}
			if froms[0] != froms[1] || froms[1] != froms[2] {
				t.Errorf("one flow came from %v", froms)
			}
			if n, err := c.Write(make([]byte, 1<<16)); n != 0 || !errors.Is(err, syscall.EMSGSIZE) {
				t.Errorf("65536 bytes: %d, %v", n, err)
			}
			_, _ = c.Write([]byte("long"))
			if n, err := c.Read(buf[:2]); n != 2 || err != nil {
				t.Errorf("a short read: %d, %v", n, err)
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			var ne net.Error
			if _, err := c.Read(buf); !errors.As(err, &ne) || !ne.Timeout() {
				t.Errorf("silence: %v, want a time-out", err)
			}
			_ = c.Close()
			waitStreams(t, s.m, 0)
		})
	}
}

// TestUDPNobodyListens: silence, and a server that comes later is heard.
func TestUDPNobodyListens(t *testing.T) {
	testenv.CheckGoroutines(t)
	held, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := flows(t)
	c, err := s.OpenUDP(testenv.Context(t), uint16(held.LocalAddr().(*net.UDPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	address := held.LocalAddr().String()
	_ = held.Close()
	for range 10 {
		if _, err := c.Write([]byte("anybody?")); err != nil {
			t.Fatal(err)
		}
	}
	_ = echoUDP(t, address)
	buf := make([]byte, 100)
	for late := time.Now().Add(20 * time.Second); ; {
		_, _ = c.Write([]byte("now?"))
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := c.Read(buf); err == nil {
			if string(buf[:n]) != "now?" && string(buf[:n]) != "anybody?" {
				t.Errorf("heard %q", buf[:n])
			}
			break
		} else if time.Now().After(late) {
			t.Fatal(err)
		}
	}
	_ = c.Close()
	waitStreams(t, s.m, 0)
}

// TestDatagramsNeverWait writes to a guest that reads nothing.
func TestDatagramsNeverWait(t *testing.T) {
	testenv.CheckGoroutines(t)
	_, host, guest := pair(t)
	c := newDatagrams(host)
	for i := range 1000 {
		if _, err := c.Write(bytes.Repeat([]byte{byte(i)}, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	_ = c.CloseWrite()
	in, whole := datagramReader{r: guest}, 0
	for {
		b, err := in.next()
		if err == io.EOF {
			break
		}
		if err != nil || len(b) != 1000 || strings.Trim(string(b), string(b[:1])) != "" {
			t.Fatalf("datagram %d: %d bytes, %v", whole, len(b), err)
		}
		whole++
	}
	if whole == 0 || whole == 1000 {
		t.Errorf("%d of 1000 datagrams arrived: some should, and some be lost", whole)
	}
}

func TestUDPTable(t *testing.T) {
	table := "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n" +
		"  511: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0\n" +
		"  512: 0201A8C0:0035 0100007F:1000 01 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0\n" +
		"  513: 00000000:1F90 00000000:0000 07\n  514: B80D0120000000000000000001000000:0035 0:0 07\n 515: zz:0035 0:0 07\n short\n"
	for port, want := range map[uint16]string{53: "127.0.0.1 2001:db8::1", 8080: "0.0.0.0", 1: ""} {
		var got []string
		for _, a := range boundIn(strings.NewReader(table), port) {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("port %d: %v, want %s", port, got, want)
		}
	}
}

// FuzzDatagrams: whatever comes is cut at the lengths that stand in it, however
// it arrives.
func FuzzDatagrams(f *testing.F) {
	f.Add([]byte{0, 1, 'x', 0, 0, 0, 2, 'y', 'z'}, 1)
	f.Add([]byte{0xff, 0xff, 1}, 3)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		d, rest := datagramReader{r: &steps{in, max(1, step)}}, in
		for {
			b, err := d.next()
			if err != nil {
				if whole := len(rest) == 0; whole != (err == io.EOF) {
					t.Fatalf("%v with %d bytes left", err, len(rest))
				}
				return
			}
			if len(rest) < 2+len(b) || !bytes.Equal(rest[2:2+len(b)], b) || int(rest[0])<<8|int(rest[1]) != len(b) {
				t.Fatalf("datagram %x is not at %x", b, rest)
			}
			rest = rest[2+len(b):]
		}
	})
}

// steps delivers few bytes at a time.
type steps struct {
	left []byte
	n    int
}

func (s *steps) Read(p []byte) (int, error) {
	if len(s.left) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.left[:min(s.n, len(s.left))])
	s.left = s.left[n:]
	return n, nil
}

func TestUDPDenied(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	listen(t, v, func(context.Context, uint16) (net.Conn, error) { return nil, errors.New("never") })
	s := dial(t, ctx, v)
	_, udp := s.OpenUDP(ctx, 53)
	_, unix := s.OpenUnix(ctx, "docker")
	for _, err := range []error{udp, unix} {
		var status *StatusError
		if !errors.As(err, &status) || status.Status != StatusDenied {
			t.Errorf("%v, want denied", err)
		}
	}
}
