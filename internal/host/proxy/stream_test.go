package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

type text = wrapperspb.StringValue

// The guest's side of streams, by procedures that are on the list.
const (
	chatRPC = "/process.Process/Connect"
	tellRPC = "/process.Process/Start"
	askRPC  = "/process.Process/List"
)

func streamGuest() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(chatRPC, connect.NewBidiStreamHandler(chatRPC, func(_ context.Context, s *connect.BidiStream[text, text]) error {
		s.ResponseTrailer().Set("Farewell", "bye")
		for {
			m, err := s.Receive()
			if errors.Is(err, io.EOF) {
				return connect.NewError(connect.CodeAborted, errors.New("enough"))
			}
			if err != nil {
				return err
			}
			if err := s.Send(wrapperspb.String("re: " + m.GetValue())); err != nil {
				return err
			}
		}
	}))
	mux.Handle(tellRPC, connect.NewServerStreamHandler(tellRPC, func(ctx context.Context, r *connect.Request[text], s *connect.ServerStream[text]) error {
		for i := range 3 {
			if err := s.Send(wrapperspb.String(fmt.Sprint(i))); err != nil {
				return err
			}
		}
		if r.Msg.GetValue() == "stay" {
			<-ctx.Done()
		}
		return nil
	}))
	mux.Handle(askRPC, connect.NewUnaryHandler(askRPC, func(_ context.Context, r *connect.Request[text]) (*connect.Response[text], error) {
		return connect.NewResponse(wrapperspb.String("user " + r.Header().Get("Authorization"))), nil
	}))
	return mux
}

// protocols are the three RPC protocols.
func protocols() map[string][]connect.ClientOption {
	return map[string][]connect.ClientOption{
		"connect": nil, "json": {connect.WithProtoJSON()}, "grpc": {connect.WithGRPC()}, "grpcweb": {connect.WithGRPCWeb()},
	}
}

// TestBidiStream: messages pass one by one both ways, with trailers and the
// guest's own error at the end, and the sandbox is held until then.
func TestBidiStream(t *testing.T) {
	for name, options := range protocols() {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, streamGuest())
			c := connect.NewClient[text, text](w.client(t, true), "http://front/sandboxes/sb-abc"+chatRPC, options...)
			s := c.CallBidiStream(testenv.Context(t))
			for i := range 5 {
				if err := s.Send(wrapperspb.String(fmt.Sprint(i))); err != nil {
					t.Fatal(err)
				}
				m, err := s.Receive()
				if err != nil || m.GetValue() != fmt.Sprint("re: ", i) {
					t.Fatalf("answer %d: %v, %v", i, m, err)
				}
			}
			w.awaitUse(t, 1)
			if err := s.CloseRequest(); err != nil {
				t.Fatal(err)
			}
			_, err := s.Receive()
			if connect.CodeOf(err) != connect.CodeAborted || !strings.Contains(err.Error(), "enough") {
				t.Errorf("end of stream: %v", err)
			}
			if got := s.ResponseTrailer().Get("Farewell"); got != "bye" {
				t.Errorf("trailer %q", got)
			}
			if err := s.CloseResponse(); err != nil {
				t.Fatal(err)
			}
			w.awaitUse(t, 0)
		})
	}
}

func TestServerStreamAndUnary(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		for name, options := range protocols() {
			if name == "grpc" && !http2 {
				continue // gRPC is HTTP/2
			}
			t.Run(name, func(t *testing.T) {
				w := newWorld(t, streamGuest())
				hc := w.client(t, http2)
				s, err := connect.NewClient[text, text](hc, "http://front/sandboxes/sb-abc"+tellRPC, options...).
					CallServerStream(testenv.Context(t), connect.NewRequest(wrapperspb.String("")))
				if err != nil {
					t.Fatal(err)
				}
				var got string
				for s.Receive() {
					got += s.Msg().GetValue()
				}
				if got != "012" || s.Err() != nil || s.Close() != nil {
					t.Errorf("got %q, %v", got, s.Err())
				}

				req := connect.NewRequest(wrapperspb.String(""))
				req.Header().Set("Authorization", "Basic dXNlcjo=") // how SDKs name the user
				res, err := connect.NewClient[text, text](hc, "http://front/sandboxes/sb-abc"+askRPC, options...).CallUnary(testenv.Context(t), req)
				if err != nil || res.Msg.GetValue() != "user Basic dXNlcjo=" {
					t.Errorf("got %v, %v", res, err)
				}
				w.awaitUse(t, 0)
			})
		}
	})
}

// TestFailuresInEveryProtocol: clients see the code, not broken framing.
func TestFailuresInEveryProtocol(t *testing.T) {
	for name, options := range protocols() {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, streamGuest())
			w.set(sandbox.Paused)
			hc := w.client(t, true)
			_, err := connect.NewClient[text, text](hc, "http://front/sandboxes/sb-abc"+askRPC, options...).
				CallUnary(testenv.Context(t), connect.NewRequest(wrapperspb.String("")))
			var ce *connect.Error
			if !errors.As(err, &ce) || ce.Code() != connect.CodeFailedPrecondition || !strings.Contains(ce.Message(), "paused") {
				t.Fatalf("unary: %v", err)
			}
			if got := ce.Meta().Get(FailureHeader); got != string(NotRunning) {
				t.Errorf("unary: %s %q", FailureHeader, got)
			}
			s := connect.NewClient[text, text](hc, "http://front/sandboxes/sb-nope"+chatRPC, options...).CallBidiStream(testenv.Context(t))
			if err := s.Send(nil); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			_, err = s.Receive()
			if connect.CodeOf(err) != connect.CodeNotFound {
				t.Errorf("stream: %v", err)
			}
			if got := s.ResponseHeader().Get(FailureHeader); got != string(NotFound) {
				t.Errorf("stream: %s %q", FailureHeader, got)
			}
		})
	}
}

// TestCallerLeaves: the guest's side of a stream ends, and with it the hold.
func TestCallerLeaves(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		w := newWorld(t, streamGuest())
		ctx, leave := context.WithCancel(testenv.Context(t))
		defer leave()
		s, err := connect.NewClient[text, text](w.client(t, http2), "http://front/sandboxes/sb-abc"+tellRPC).
			CallServerStream(ctx, connect.NewRequest(wrapperspb.String("stay")))
		if err != nil {
			t.Fatal(err)
		}
		if !s.Receive() {
			t.Fatal(s.Err())
		}
		w.awaitUse(t, 1)
		leave()
		w.awaitUse(t, 0)
	})
}

func TestWebSocket(t *testing.T) {
	w := newWorld(t, nil)
	w.servePort(t, 3000, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(rw, r, nil) // checks Origin against Host
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(1 << 20)
		for {
			kind, m, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), kind, append([]byte("re: "), m...)) != nil {
				return
			}
		}
	}))
	for name, x := range map[string]struct{ url, host, origin string }{
		"path":         {"ws://front/sandboxes/sb-abc/ports/3000/ws", "", ""},
		"host, a page": {"ws://front/ws", "3000-sb-abc.localhost:7777", "http://3000-sb-abc.localhost:7777"},
	} {
		t.Run(name, func(t *testing.T) {
			o := &websocket.DialOptions{HTTPClient: w.client(t, false), Host: x.host, HTTPHeader: http.Header{}}
			if x.origin != "" {
				o.HTTPHeader.Set("Origin", x.origin)
			}
			c, _, err := websocket.Dial(testenv.Context(t), x.url, o)
			if err != nil {
				t.Fatal(err)
			}
			defer c.CloseNow()
			c.SetReadLimit(1 << 20)
			for _, m := range []string{"hello", strings.Repeat("x", 300<<10)} {
				if err := c.Write(testenv.Context(t), websocket.MessageText, []byte(m)); err != nil {
					t.Fatal(err)
				}
				if _, got, err := c.Read(testenv.Context(t)); err != nil || string(got) != "re: "+m {
					t.Fatalf("%d bytes, %v", len(got), err)
				}
			}
			w.awaitUse(t, 1)
			if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
				t.Error(err)
			}
			w.awaitUse(t, 0)
		})
	}
}

// listenTCP serves raw connections on a port of the guest.
func (w *world) listenTCP(t *testing.T, port uint16, serve func(*net.TCPConn)) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	w.guest.listen(port, l.Addr().String())
}

// dialTunnel opens a tunnel over HTTP/1.1 and sends early right behind the
// request.
func (w *world) dialTunnel(t *testing.T, authority, early string) (*net.TCPConn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", w.front.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if d, ok := testenv.Context(t).Deadline(); ok {
		conn.SetDeadline(d)
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n%s", authority, authority, early); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"})
	if err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn), r, res
}

// TestTunnelHalfClose: the caller ends its side, the guest goes on; and the
// other way round.
func TestTunnelHalfClose(t *testing.T) {
	for _, authority := range []string{"sb-abc:25", "sb-a:25", "25-sb-abc.localhost:80"} {
		t.Run(authority, func(t *testing.T) {
			w := newWorld(t, nil)
			w.listenTCP(t, 25, func(c *net.TCPConn) {
				all, _ := io.ReadAll(c) // until the caller's half-close
				fmt.Fprintf(c, "got %s", all)
			})
			conn, r, res := w.dialTunnel(t, authority, "early ")
			if res.StatusCode != 200 {
				t.Fatal(res.Status)
			}
			w.awaitUse(t, 1)
			io.WriteString(conn, "late")
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(r); err != nil || string(got) != "got early late" {
				t.Errorf("%q, %v", got, err)
			}
			w.awaitUse(t, 0)
		})
	}
	t.Run("guest first", func(t *testing.T) {
		w := newWorld(t, nil)
		heard := make(chan string, 1)
		w.listenTCP(t, 25, func(c *net.TCPConn) {
			io.WriteString(c, "hello")
			c.CloseWrite()
			all, _ := io.ReadAll(c)
			heard <- string(all)
		})
		conn, r, _ := w.dialTunnel(t, "sb-abc:25", "")
		if got, err := io.ReadAll(r); err != nil || string(got) != "hello" {
			t.Fatalf("%q, %v", got, err)
		}
		w.awaitUse(t, 1)
		io.WriteString(conn, "after the guest's end")
		conn.CloseWrite()
		if got := <-heard; got != "after the guest's end" {
			t.Errorf("guest heard %q", got)
		}
		w.awaitUse(t, 0)
	})
}

func TestTunnelRefused(t *testing.T) {
	w := newWorld(t, nil)
	for authority, want := range map[string]struct {
		status  int
		failure Failure
	}{
		"sb-abc:26":               {503, PortClosed},
		"sb-nope:25":              {404, NotFound},
		"sb-abc:0":                {400, ""},
		"169.254.169.254:80":      {400, ""},
		"[::1]:80":                {400, ""},
		"localhost:22":            {404, NotFound},
		"25-sb-abc.localhost:22":  {400, ""},
		"25-sb-abc.localhost:443": {503, PortClosed},
	} {
		_, _, res := w.dialTunnel(t, authority, "")
		if res.StatusCode != want.status || res.Header.Get(FailureHeader) != string(want.failure) {
			t.Errorf("%s: %d %q, want %v", authority, res.StatusCode, res.Header.Get(FailureHeader), want)
		}
	}
}

// TestTunnelCallerDies: no half-close, no goodbye.
func TestTunnelCallerDies(t *testing.T) {
	w := newWorld(t, nil)
	w.listenTCP(t, 25, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	conn, _, _ := w.dialTunnel(t, "sb-abc:25", "")
	w.awaitUse(t, 1)
	conn.SetLinger(0) // reset
	conn.Close()
	w.awaitUse(t, 0)
}

// TestTunnelOverHTTP2 runs an echo through a CONNECT stream.
func TestTunnelOverHTTP2(t *testing.T) {
	w := newWorld(t, nil)
	w.listenTCP(t, 7, func(c *net.TCPConn) { io.Copy(c, c) })
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(testenv.Context(t), "CONNECT", "http://sb-abc:7", pr)
	if err != nil {
		t.Fatal(err)
	}
	res, err := w.client(t, true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	buf := make([]byte, 5)
	for _, m := range []string{"hello", "again"} {
		io.WriteString(pw, m)
		if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != m {
			t.Fatalf("%q, %v", buf, err)
		}
	}
	w.awaitUse(t, 1)
	pw.Close()
	if rest, err := io.ReadAll(res.Body); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
	w.awaitUse(t, 0)
}

// TestTunnelToDocker hands the connection over, what came early included.
func TestTunnelToDocker(t *testing.T) {
	w := newWorld(t, nil, func(p *Params) {
		p.Docker = func(id sandbox.ID, conn net.Conn) error {
			defer conn.Close()
			all, _ := io.ReadAll(conn)
			fmt.Fprintf(conn, "%s heard %s", id, all)
			return nil
		}
	})
	conn, r, res := w.dialTunnel(t, "sb-a.docker:2375", "early ")
	if res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	io.WriteString(conn, "late")
	_ = conn.CloseWrite()
	if got, err := io.ReadAll(r); err != nil || string(got) != "sb-abc heard early late" {
		t.Errorf("%q, %v", got, err)
	}
	if w.holds() != 0 {
		t.Error("a connection that serves no request holds the sandbox")
	}
	for authority, want := range map[string]int{"sb-abc.docker:80": 400, "sb-nope.docker:2375": 404, ".docker:2375": 400} {
		if _, _, res := w.dialTunnel(t, authority, ""); res.StatusCode != want {
			t.Errorf("%s: %d, want %d", authority, res.StatusCode, want)
		}
	}
	bare := newWorld(t, nil)
	if _, _, res := bare.dialTunnel(t, "sb-abc.docker:2375", ""); res.StatusCode != 501 {
		t.Errorf("without Docker: %d", res.StatusCode)
	}
}
