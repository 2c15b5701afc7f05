package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/testenv"
)

// TestRequestHeaders: what a guest gets to see of a request full of things it
// should not see, or should not believe.
func TestRequestHeaders(t *testing.T) {
	sent := []string{
		"Connection", "close, X-Secret-Hop", "X-Secret-Hop", "1", "Keep-Alive", "1", "Proxy-Connection", "1",
		"Te", "trailers, deflate", "Proxy-Authorization", "Basic x",
		"X-Forwarded-For", "203.0.113.9", "X-Forwarded-Host", "bank.example", "X-Forwarded-Proto", "https",
		"X-Forwarded-Prefix", "/evil", "X-Forwarded-Port", "1", "X-Real-Ip", "203.0.113.9", "Forwarded", "for=203.0.113.9",
		"Hutch-Token", "t", "Hutch-Other", "x", "Cookie", "a=b", "Authorization", "Bearer guests-own",
		"User-Agent", "test", "X-Kept", "yes", "Accept-Encoding", "identity",
	}
	for name, x := range map[string]struct {
		url, host string
		want      http.Header
	}{
		"guest API": {"http://front/sandboxes/sb-abc/files", "front", http.Header{
			"X-Kept": {"yes"}, "User-Agent": {"test"}, "Te": {"trailers"}, "Accept-Encoding": {"identity"},
		}},
		"path": {"http://front/sandboxes/sb-abc/ports/80/x", "front:7", http.Header{
			"X-Kept": {"yes"}, "User-Agent": {"test"}, "Te": {"trailers"}, "Accept-Encoding": {"identity"},
			"Authorization": {"Bearer guests-own"}, "Connection": {"close"},
			"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Host": {"front:7"}, "X-Forwarded-Proto": {"http"},
			"X-Forwarded-Prefix": {"/sandboxes/sb-abc/ports/80"},
		}},
		"host name": {"http://front/x", "80-sb-abc.localhost", http.Header{
			"X-Kept": {"yes"}, "User-Agent": {"test"}, "Te": {"trailers"}, "Accept-Encoding": {"identity"},
			"Authorization": {"Bearer guests-own"}, "Connection": {"close"}, "Cookie": {"a=b"},
			"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Host": {"80-sb-abc.localhost"}, "X-Forwarded-Proto": {"http"},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan http.Header, 1)
			h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header })
			w := newWorld(t, h)
			w.servePort(t, 80, h)
			get(t, w.client(t, false), x.url, x.host, sent...)
			if diff := cmp.Diff(x.want, <-seen); diff != "" {
				t.Errorf("guest sees (-want +got):\n%s", diff)
			}
		})
	}
}

// hostile is a guest that says all it should not.
func hostile(w http.ResponseWriter, r *http.Request) {
	early := w.Header()
	early.Set("Set-Cookie", "early=1")
	early.Set("Link", "</x>; rel=preload")
	w.WriteHeader(http.StatusEarlyHints)
	clear(early)
	h := w.Header()
	h.Set("Trailer", "X-Sum, Hutch-Error")
	h.Set("Hutch-Error", "sandbox_not_found")
	h.Set("hutch-other", "x")
	h.Set("Alt-Svc", `h2="evil.example:443"`)
	h.Set("Clear-Site-Data", `"*"`)
	h.Set("Strict-Transport-Security", "max-age=1")
	h.Set("Service-Worker-Allowed", "/")
	h.Set("Content-Security-Policy", "default-src *")
	h.Add("Set-Cookie", "a=1; Domain=localhost; Path=/")
	h.Add("Set-Cookie", "b=2;domain=.evil.example ;Secure")
	h.Set("X-Kept", "yes")
	io.WriteString(w, "body")
	h.Set("X-Sum", "123")
	h.Set("Hutch-Error", "sandbox_not_found")
	h.Set(http.TrailerPrefix+"Set-Cookie", "late=1")
	h.Set(http.TrailerPrefix+"X-Late", "1")
}

func TestResponseHeaders(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		w := newWorld(t, http.HandlerFunc(hostile))
		w.servePort(t, 80, http.HandlerFunc(hostile))
		common := http.Header{"X-Kept": {"yes"}}
		for name, x := range map[string]struct {
			url, host string
			want      http.Header
		}{
			"files": {"http://front/sandboxes/sb-abc/files", "", http.Header{
				"Content-Security-Policy": {"default-src *", pageSandbox}, "X-Content-Type-Options": {"nosniff"},
			}},
			"RPC": {"http://front/sandboxes/sb-abc/process.Process/List", "", http.Header{
				"Content-Security-Policy": {"default-src *"}, "X-Content-Type-Options": {"nosniff"},
			}},
			"path": {"http://front/sandboxes/sb-abc/ports/80/", "", http.Header{
				"Content-Security-Policy": {"default-src *", pageSandbox}, "X-Content-Type-Options": {"nosniff"},
			}},
			"host name": {"http://front/", "80-sb-abc.localhost", http.Header{
				"Content-Security-Policy": {"default-src *"}, "Clear-Site-Data": {`"*"`},
				"Strict-Transport-Security": {"max-age=1"}, "Service-Worker-Allowed": {"/"},
				"Set-Cookie": {"a=1; Path=/", "b=2;Secure"},
			}},
		} {
			res, body := get(t, w.client(t, http2), x.url, x.host)
			got := res.Header.Clone()
			for _, name := range []string{"Date", "Content-Type", "Content-Length"} {
				got.Del(name)
			}
			for k, v := range common {
				x.want[k] = v
			}
			if diff := cmp.Diff(x.want, got); diff != "" || body != "body" {
				t.Errorf("%s: %q, caller sees (-want +got):\n%s", name, body, diff)
			}
			trailer := http.Header{}
			for k, v := range res.Trailer {
				if len(v) > 0 {
					trailer[k] = v
				}
			}
			if diff := cmp.Diff(http.Header{"X-Sum": {"123"}, "X-Late": {"1"}}, trailer); diff != "" {
				t.Errorf("%s: trailer (-want +got):\n%s", name, diff)
			}
		}
	})
}

// raw answers every connection to a port with the same bytes.
func (w *world) raw(t *testing.T, port uint16, answer func(net.Conn)) {
	w.listenTCP(t, port, func(c *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			answer(c)
		}
	})
}

func TestHostileAnswers(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"garbage":      func(c net.Conn) { io.WriteString(c, "\x00\x01\x02 garbage\r\n\r\n") },
		"nothing":      func(net.Conn) {},
		"half a head":  func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nX: ") },
		"endless head": func(c net.Conn) { endless(c, "X-A: "+strings.Repeat("a", 1000)+"\r\n") },
		"endless line": func(c net.Conn) { endless(c, strings.Repeat("a", 1000)) },
		"no colon":     func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nX y 1\r\n\r\n") },
		"two lengths": func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")
		},
		"negative length": func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n") },
		"unasked upgrade": func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: evil\r\n\r\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			w.raw(t, 80, answer)
			res, body := get(t, w.client(t, false), "http://front/sandboxes/sb-abc/ports/80/", "")
			if res.StatusCode != 503 || res.Header.Get(FailureHeader) != string(Unreachable) {
				t.Errorf("%d %q: %s", res.StatusCode, res.Header.Get(FailureHeader), body)
			}
			w.awaitUse(t, 0)
		})
	}
}

func endless(c net.Conn, line string) {
	io.WriteString(c, "HTTP/1.1 200 OK\r\n")
	for range 1 << 20 {
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
}

// TestCutAnswer: an answer that breaks off is not taken for a whole one.
func TestCutAnswer(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		w := newWorld(t, nil)
		w.raw(t, 80, func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
		})
		res, err := w.client(t, http2).Get("http://front/sandboxes/sb-abc/ports/80/")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if got, err := io.ReadAll(res.Body); err == nil {
			t.Errorf("%q read as a whole answer", got)
		}
		w.awaitUse(t, 0)
	})
}

// TestSmuggling sends heads that two parsers could read differently. What
// counts is that a guest never sees a request that the proxy did not see as one
// of its own, with its own rights: a request behind a chunked body is one.
func TestSmuggling(t *testing.T) {
	for name, head := range map[string]string{
		"length and chunked":   "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /sandboxes/sb-abc/ports/80/smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
		"two lengths":          "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
		"odd transfer coding":  "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
		"coding twice":         "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
		"blank before colon":   "Content-Length : 4\r\n\r\nabcd",
		"folded line":          "X-A: 1\r\n Transfer-Encoding: chunked\r\n\r\n",
		"line feed in a value": "X-A: 1\nX-B: 2\r\n\r\n",
		"two hosts":            "Host: 80-sb-abc.localhost\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var requests []string // by the connection they came on
			w := newWorld(t, nil)
			w.servePort(t, 80, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				mu.Lock()
				defer mu.Unlock()
				requests = append(requests, r.RemoteAddr)
			}))
			conn, err := net.Dial("tcp", w.front.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if d, ok := testenv.Context(t).Deadline(); ok {
				conn.SetDeadline(d)
			}
			fmt.Fprintf(conn, "POST /sandboxes/sb-abc/ports/80/one HTTP/1.1\r\nHost: front\r\n%s", head)
			conn.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, conn)
			w.awaitUse(t, 0)
			mu.Lock()
			defer mu.Unlock()
			w.mu.Lock()
			defer w.mu.Unlock()
			if len(requests) > w.used {
				t.Errorf("guest saw %d requests, the proxy %d", len(requests), w.used)
			}
			slices.Sort(requests)
			if n := len(slices.Compact(slices.Clone(requests))); n != len(requests) {
				t.Errorf("guest saw %d requests on %d connections", len(requests), n)
			}
		})
	}
}

func TestCrossOrigin(t *testing.T) {
	w := newWorld(t, nil)
	for _, x := range []struct {
		method, path, host, origin, upgrade string
		want                                bool
	}{
		{"GET", "/", "80-sb-abc.localhost", "https://evil.example", "", true},
		{"POST", "/", "80-sb-abc.localhost", "https://evil.example", "", false},
		{"GET", "/", "80-sb-abc.localhost", "https://evil.example", "websocket", false},
		{"POST", "/", "80-sb-abc.localhost", "http://3000-sb-abc.localhost:7777", "", true},
		{"GET", "/", "80-sb-abc.localhost", "http://3000-sb-abc.localhost:7777", "websocket", true},
		{"POST", "/", "80-sb-abc.localhost", "http://3000-sb-other.localhost", "", false},
		{"POST", "/", "80-sb-abc.localhost", "http://3000-sb-abc.localhost.evil.example", "", false},
		{"POST", "/", "80-sb-abc.localhost", "null", "", false},
		{"POST", "/", "80-sb-abc.localhost", "http://localhost", "", false},
		{"GET", "/sandboxes/sb-abc/ports/80/", "localhost", "https://evil.example", "", true},
		{"POST", "/sandboxes/sb-abc/ports/80/", "localhost", "http://3000-sb-abc.localhost", "", false},
		{"GET", "/sandboxes/sb-abc/files", "localhost", "https://evil.example", "", false},
		{"GET", "/files", "49983-sb-abc.localhost", "http://3000-sb-abc.localhost", "", false},
		{"GET", "/hostagent.v1.HostAgentService/Exec", "localhost", "http://3000-sb-abc.localhost", "", false},
	} {
		r := httptest.NewRequest(x.method, x.path, nil)
		r.Host = x.host
		r.Header.Set("Origin", x.origin)
		if x.upgrade != "" {
			r.Header.Set("Upgrade", x.upgrade)
		}
		if got := w.proxy.CrossOrigin(r); got != x.want {
			t.Errorf("%+v: %v", x, got)
		}
	}
}
