package proxy

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

const boxID = sandbox.ID("sb-abc")

// world is a proxy in front of one fake sandbox whose guest is real servers on
// loopback.
type world struct {
	*fakeBoxes
	proxy *Proxy
	front *httptest.Server
}

// newWorld serves the guest APIs by api (nil: none) and returns the proxy
// before them, over HTTP/1.1 and HTTP/2.
func newWorld(t *testing.T, api http.Handler, change ...func(*Params)) *world {
	t.Helper()
	testenv.CheckGoroutines(t)
	boxes := &fakeBoxes{state: sandbox.Running, guest: &fakeGuest{ports: map[uint16]string{}}, changed: make(chan struct{})}
	if api != nil {
		s := startServer(t, api)
		boxes.guest.api = guestTransport(s.Listener.Addr().String())
		t.Cleanup(boxes.guest.api.CloseIdleConnections)
	}
	p := Params{Sandboxes: boxes, Authorize: allowAll, Log: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&p)
	}
	proxy, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{fakeBoxes: boxes, proxy: proxy, front: startServer(t, proxy)}
	t.Cleanup(func() {
		if err := proxy.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func allowAll(context.Context, string) error { return nil }

func startServer(t *testing.T, h http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// guestTransport speaks HTTP/2 to addr, whatever the request says.
func guestTransport(addr string) *http.Transport {
	tr := &http.Transport{
		Protocols: new(http.Protocols), DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
	}
	tr.Protocols.SetUnencryptedHTTP2(true)
	return tr
}

// client returns a client of the front that speaks HTTP/1.1 or HTTP/2.
func (w *world) client(t *testing.T, http2 bool) *http.Client {
	t.Helper()
	addr := w.front.Listener.Addr().String()
	tr := guestTransport(addr)
	tr.Protocols = new(http.Protocols)
	tr.Protocols.SetHTTP1(!http2)
	tr.Protocols.SetUnencryptedHTTP2(http2)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// servePort makes h the server on a port of the guest.
func (w *world) servePort(t *testing.T, port uint16, h http.Handler) {
	t.Helper()
	w.guest.listen(port, startServer(t, h).Listener.Addr().String())
}

// fakeBoxes is one sandbox, boxID.
type fakeBoxes struct {
	mu      sync.Mutex
	state   sandbox.State
	useErr  error
	inUse   int
	used    int
	changed chan struct{} // closed and made anew when inUse changes
	guest   *fakeGuest
}

func (b *fakeBoxes) Get(idOrPrefix string) (lifecycle.View, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !strings.HasPrefix(string(boxID), idOrPrefix) || b.state == sandbox.Gone {
		return lifecycle.View{}, fault.New(fault.NotFound, "no sandbox %q", idOrPrefix)
	}
	return lifecycle.View{Record: sandbox.Record{ID: boxID, State: b.state}}, nil
}

func (b *fakeBoxes) Use(_ context.Context, id sandbox.ID) (guestconn.Guest, func(), error) {
	if _, err := b.Get(string(id)); err != nil || id != boxID {
		return nil, nil, fault.New(fault.NotFound, "no sandbox %q", id)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.useErr != nil {
		return nil, nil, b.useErr
	}
	if _, why := sandbox.Decide(b.state, sandbox.Use); why != "" {
		return nil, nil, fault.New(fault.Precondition, "%s", why)
	}
	b.count(1)
	return b.guest, sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.count(-1)
	}), nil
}

func (b *fakeBoxes) count(n int) {
	b.inUse += n
	if n > 0 {
		b.used++
	}
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *fakeBoxes) set(s sandbox.State) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.state = s
}

// awaitUse waits until the sandbox is held by n.
func (b *fakeBoxes) awaitUse(t *testing.T, n int) {
	t.Helper()
	late := time.After(10 * time.Second)
	for {
		b.mu.Lock()
		now, changed := b.inUse, b.changed
		b.mu.Unlock()
		if now == n {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("sandbox held by %d, want %d", now, n)
		}
	}
}

func (b *fakeBoxes) holds() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.inUse
}

// fakeGuest has its ports and APIs on loopback.
type fakeGuest struct {
	guestconn.Guest // the methods that the proxy has no business with
	api             *http.Transport
	dialErr         error

	mu    sync.Mutex
	ports map[uint16]string
}

func (g *fakeGuest) listen(port uint16, addr string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ports[port] = addr
}

func (g *fakeGuest) Transport() http.RoundTripper { return g.api }

func (g *fakeGuest) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	g.mu.Lock()
	addr, ok := g.ports[port]
	err := g.dialErr
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fault.As(fault.Unavailable, &link.StatusError{Status: link.StatusRefused, Target: fmt.Sprint("tcp:", port)})
	}
	return new(net.Dialer).DialContext(ctx, "tcp", addr)
}

// get asks for path at host, with pairs of header names and values.
func get(t *testing.T, c *http.Client, url, host string, header ...string) (*http.Response, string) {
	t.Helper()
	return do(t, c, "GET", url, host, "", header...)
}

func do(t *testing.T, c *http.Client, method, url, host, body string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(testenv.Context(t), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if host != "" {
		req.Host = host
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(got)
}

// echo answers with what it was asked.
func echo(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "%s %s host=%s", r.Method, r.RequestURI, r.Host)
}

func bothProtocols(t *testing.T, test func(t *testing.T, http2 bool)) {
	for _, http2 := range []bool{false, true} {
		t.Run(map[bool]string{false: "http1", true: "http2"}[http2], func(t *testing.T) { test(t, http2) })
	}
}

func TestFormsOfAddress(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		w := newWorld(t, http.HandlerFunc(echo))
		w.servePort(t, 8080, http.HandlerFunc(echo))
		c := w.client(t, http2)
		for _, x := range []struct{ url, host, header, want string }{
			{"/sandboxes/sb-abc/process.Process/List", "", "", "GET /process.Process/List host=guest"},
			{"/sandboxes/sb-/process.Process/List", "", "", "GET /process.Process/List host=guest"},
			{"/sandboxes/sb-abc/files?path=/etc/a%20b;c", "", "", "GET /files?path=/etc/a%20b;c host=guest"},
			{"/sandboxes/sb-abc/health", "", "", "GET /health host=guest"},
			{"/filesystem.Filesystem/Stat", "", "sb-abc", "GET /filesystem.Filesystem/Stat host=guest"},
			{"/arcbox.v1.AgentService/Ping", "49983-sb-abc.localhost:7777", "", "GET /arcbox.v1.AgentService/Ping host=guest"},
			{"/sandboxes/sb-abc/ports/8080", "front:1", "", "GET / host=front:1"},
			{"/sandboxes/sb-abc/ports/8080/", "front:1", "", "GET / host=front:1"},
			{"/sandboxes/sb/ports/8080/a/%2e%2e/b%2Fc//d?x=1&x=2;y", "front:1", "", "GET /a/%2e%2e/b%2Fc//d?x=1&x=2;y host=front:1"},
			{"/a%2fb?q", "8080-sb-abc.localhost:7777", "", "GET /a%2fb?q host=8080-sb-abc.localhost:7777"},
			{"/", "8080-SB-ABC.LocalHost.", "", "GET / host=8080-SB-ABC.LocalHost."},
			// The host name decides before path and header.
			{"/sandboxes/sb-other/process.Process/List", "8080-sb-abc.localhost", "sb-other", "GET /sandboxes/sb-other/process.Process/List host=8080-sb-abc.localhost"},
			{"/hostagent.v1.HostAgentService/Exec", "8080-sb-abc.localhost", "", "GET /hostagent.v1.HostAgentService/Exec host=8080-sb-abc.localhost"},
		} {
			var header []string
			if x.header != "" {
				header = []string{SandboxHeader, x.header}
			}
			if res, got := get(t, c, "http://front"+x.url, x.host, header...); got != x.want {
				t.Errorf("%s at %q: %d %q, want %q", x.url, x.host, res.StatusCode, got, x.want)
			}
		}
		w.awaitUse(t, 0)
	})
}

// TestBadAddresses: nothing but the plain forms leads anywhere, and nothing
// reaches a guest on the way.
func TestBadAddresses(t *testing.T) {
	touched := func(w http.ResponseWriter, r *http.Request) { t.Errorf("guest was asked %s", r.RequestURI) }
	w := newWorld(t, http.HandlerFunc(touched))
	w.servePort(t, 8080, http.HandlerFunc(touched))
	for _, x := range []struct {
		path, host, header string
		status             int
		failure            Failure
	}{
		{"/sandboxes", "", "", 404, ""},
		{"/sandboxes/", "", "", 404, ""},
		{"/sandboxes/sb-abc", "", "", 404, ""},
		{"/sandboxes/sb-abc/", "", "", 404, ""},
		{"/sandboxes//health", "", "", 400, ""},
		{"//sandboxes/sb-abc/health", "", "sb-abc", 404, ""},
		{"/sandboxes/sb-abc//health", "", "", 404, ""},
		{"/sandboxes/sb-abc/../sb-abc/health", "", "", 404, ""},
		{"/sandboxes/../sandboxes/sb-abc/health", "", "", 404, ""},
		{"/sandboxes/%73b-abc/health", "", "", 400, ""},
		{"/sandboxes/sb-abc%2fhealth", "", "", 404, ""},
		{"/%73andboxes/sb-abc/health", "", "", 404, ""},
		{"/sandboxes/sb-abc/%68ealth", "", "", 404, ""},
		{"/sandboxes/SB-ABC/health", "", "", 400, ""},
		{"/sandboxes/sb-abc/health/", "", "", 404, ""},
		{"/sandboxes/sb-abc/init", "", "", 404, ""},
		{"/sandboxes/sb-abc/metrics", "", "", 404, ""},
		{"/sandboxes/sb-abc/filesystem", "", "", 404, ""},
		{"/sandboxes/sb-abc/files/../init", "", "", 404, ""},
		{"/sandboxes/sb-abc/files%2f..%2finit", "", "", 404, ""},
		{"/sandboxes/sb-abc/files/%2e%2e/init", "", "", 404, ""},
		{"/sandboxes/sb-abc/hutch.guest.v1.GuestService/Configure", "", "", 404, ""},
		{"/sandboxes/sb-abc/process.Process/../hutch.guest.v1.GuestService/Configure", "", "", 404, ""},
		{"/sandboxes/sb-abc/process.Process/..%2fhutch.guest.v1.GuestService%2fConfigure", "", "", 404, ""},
		{"/sandboxes/sb-abc/process.Process/List/../../hutch.guest.v1.GuestService/Configure", "", "", 404, ""},
		{"/hutch.guest.v1.GuestService/Configure", "", "sb-abc", 404, ""},
		{"/hutch.guest.v1.GuestService/Configure", "49983-sb-abc.localhost", "", 404, ""},
		{"/hostagent.v1.HostAgentService/Exec", "", "sb-abc", 404, ""},
		{"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "", "sb-abc", 404, ""},
		{"/sandboxes/sb-abc/ports/", "", "", 400, ""},
		{"/sandboxes/sb-abc/ports/0/", "", "", 400, ""},
		{"/sandboxes/sb-abc/ports/65536/", "", "", 400, ""},
		{"/sandboxes/sb-abc/ports/08080/", "", "", 400, ""},
		{"/sandboxes/sb-abc/ports/+8080/", "", "", 400, ""},
		{"/sandboxes/sb-abc/ports/8080%2f/", "", "", 400, ""},
		{"/sandboxes/sb-abc/ports/%38080/", "", "", 400, ""},
		{"/sandboxes/sb-nope/health", "", "", 404, NotFound},
		{"/sandboxes/sb-nope/ports/8080/", "", "", 404, NotFound},
		{"/", "8080-sb-nope.localhost", "", 404, NotFound},
		{"/", "8080-sb-.localhost", "", 400, ""},
		{"/", "8080-sb.localhost", "", 404, NotFound}, // names take whole ids
		{"/", "8080-.localhost", "", 400, ""},
		{"/", "0-sb-abc.localhost", "", 400, ""},
		{"/", "99999-sb-abc.localhost", "", 400, ""},
		{"/", "x.8080-sb-abc.localhost", "", 400, ""},
		{"/health", "", strings.Repeat("a", 41), 400, ""},
		{"/health", "", "*", 400, ""},
	} {
		t.Run(x.path+"@"+x.host, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			if err := setPath(r, x.path); err != nil {
				t.Fatal(err)
			}
			r.Host = x.host
			if x.header != "" {
				r.Header.Set(SandboxHeader, x.header)
			}
			if !w.proxy.Match(r) && x.path[0] == '/' && !strings.HasPrefix(x.path, "/%73") {
				t.Fatalf("Match says no")
			}
			rec := httptest.NewRecorder()
			w.proxy.ServeHTTP(rec, r)
			if rec.Code != x.status || rec.Header().Get(FailureHeader) != string(x.failure) {
				t.Errorf("status %d, %s %q; want %d, %q: %s", rec.Code, FailureHeader, rec.Header().Get(FailureHeader), x.status, x.failure, rec.Body)
			}
		})
	}
	if w.used != 0 {
		t.Errorf("the sandbox was used %d times", w.used)
	}
}

// setPath gives r a request target as a client on the wire would.
func setPath(r *http.Request, path string) error {
	u, err := r.URL.Parse("http://x" + path)
	if err != nil {
		return err
	}
	u.Scheme, u.Host = "", ""
	// Parse resolves dots; take the path as it was written.
	if u.Path, err = url.PathUnescape(path); err != nil {
		return err
	}
	u.RawPath = path
	r.URL = u
	r.RequestURI = path
	return nil
}

func TestDeniedBeforeAnythingElse(t *testing.T) {
	var asked []string
	w := newWorld(t, nil, func(p *Params) {
		p.Authorize = func(_ context.Context, route string) error {
			asked = append(asked, route)
			return fault.New(fault.Denied, "no")
		}
	})
	for _, path := range []string{"/process.Process/Start", "/files", "/health", "/ports/80/"} {
		r := httptest.NewRequest("GET", "/sandboxes/sb-nope"+path, nil)
		rec := httptest.NewRecorder()
		w.proxy.ServeHTTP(rec, r)
		if rec.Code != 403 {
			t.Errorf("%s: %d; a stranger must not learn what there is", path, rec.Code)
		}
	}
	if got, want := fmt.Sprint(asked), "[/process.Process/Start guest /files guest /health guest port]"; got != want {
		t.Errorf("asked about %s, want %s", got, want)
	}
}

func TestMaxConns(t *testing.T) {
	release := make(chan struct{})
	w := newWorld(t, nil, func(p *Params) { p.MaxConns = 2 })
	w.servePort(t, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	c := w.client(t, false)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { get(t, c, "http://front/sandboxes/sb-abc/ports/80/", "") })
	}
	w.awaitUse(t, 2)
	res, body := get(t, c, "http://front/sandboxes/sb-abc/ports/80/", "")
	if res.StatusCode != 429 || res.Header.Get(FailureHeader) != string(TooMany) || !strings.Contains(body, `"resource_exhausted"`) {
		t.Errorf("third: %d %s %s", res.StatusCode, res.Header.Get(FailureHeader), body)
	}
	close(release)
	wg.Wait()
	w.awaitUse(t, 0)
	if res, _ := get(t, c, "http://front/sandboxes/sb-abc/ports/80/", ""); res.StatusCode != 200 {
		t.Errorf("after the others ended: %d", res.StatusCode)
	}
}

// TestCloseEndsEverything: what hangs in the proxy ends with it.
func TestCloseEndsEverything(t *testing.T) {
	w := newWorld(t, nil)
	w.servePort(t, 80, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	c := w.client(t, false)
	answer := make(chan int, 1)
	go func() {
		res, _ := get(t, c, "http://front/sandboxes/sb-abc/ports/80/", "")
		answer <- res.StatusCode
	}()
	w.awaitUse(t, 1)
	if err := w.proxy.Close(); err != nil {
		t.Fatal(err)
	}
	if n := w.holds(); n != 0 {
		t.Errorf("Close returned with %d in flight", n)
	}
	if got := <-answer; got != 503 {
		t.Errorf("the one in flight got %d", got)
	}
	if res, _ := get(t, c, "http://front/sandboxes/sb-abc/ports/80/", ""); res.StatusCode != 503 {
		t.Errorf("one after Close got %d", res.StatusCode)
	}
}
