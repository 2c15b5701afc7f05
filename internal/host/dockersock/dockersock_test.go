package dockersock

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

func TestSocketFollowsItsSandbox(t *testing.T) {
	w := newWorld(t)
	w.become(boxID, sandbox.Pending)
	if p := w.sockets.Path(boxID); p != "" {
		t.Errorf("a sandbox that never ran has socket %s", p)
	}
	w.running()
	st, err := os.Stat(w.path(boxID))
	if err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	if p := w.sockets.Path(boxID); p != w.path(boxID) {
		t.Errorf("path %s", p)
	}
	for _, s := range []sandbox.State{sandbox.Paused, sandbox.Running, sandbox.Hibernated, sandbox.Pending, sandbox.Running, sandbox.Stopped} {
		w.become(boxID, s)
		w.await(boxID, true)
	}
	// A directory that was lost while the sandbox slept.
	if err := os.RemoveAll(filepath.Join(w.dir, string(boxID))); err != nil {
		t.Fatal(err)
	}
	w.become(boxID, sandbox.Failed)
	w.await(boxID, true)
	w.become(boxID, sandbox.Destroying)
	w.await(boxID, false)
	w.become(boxID, sandbox.Gone)
	if left, _ := os.ReadDir(w.dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	w.running() // the same id again
	if code, body := w.do(w.client(), "GET", "/_ping", nil); code != 200 || body != "OK" {
		t.Errorf("%d %q", code, body)
	}
}

func TestOwnSandboxesHaveNone(t *testing.T) {
	w := newWorld(t)
	w.boxes.set("sb-own", sandbox.Running)
	w.boxes.change("sb-own", func(b *fakeBox) { b.spec.Purpose = "spare" })
	w.become("sb-own", sandbox.Running)
	w.running()
	if _, err := os.Stat(w.path("sb-own")); err == nil {
		t.Error("a sandbox of hutchd's own has a socket")
	}
	w.boxes.change("sb-own", func(b *fakeBox) { b.spec.Purpose = "" })
	w.become("sb-own", sandbox.Running)
	w.await("sb-own", true)
}

// TestRestart: the next hutchd serves at the same place, in place of what was
// left there by one that was killed.
func TestRestart(t *testing.T) {
	w := newWorld(t).running()
	if code, _ := w.do(w.client(), "GET", "/_ping", nil); code != 200 {
		t.Fatal(code)
	}
	w.stop()
	w.await(boxID, false)
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: w.path(boxID), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	_ = stale.Close()
	w.boxes.set("sb-slept", sandbox.Hibernated)
	w.start()
	w.await(boxID, true)
	w.await("sb-slept", true)
	if code, _ := w.do(w.client(), "GET", "/_ping", nil); code != 200 {
		t.Error(code)
	}
	if n := w.agent.starts.Load(); n != 1 {
		t.Errorf("%d daemons were started", n)
	}
}

// TestEnsuredOnceForAll: 50 clients, one call, one daemon; then none for any
// number of requests; and again after a crash.
func TestEnsuredOnceForAll(t *testing.T) {
	w := newWorld(t).running()
	w.agent.slow.Store(3)
	round := func() {
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				c := w.client()
				for range 3 {
					if code, body := w.do(c, "GET", "/_ping", nil); code != 200 || body != "OK" {
						t.Errorf("%d %q", code, body)
					}
				}
			})
		}
		wg.Wait()
	}
	round()
	if e, s := w.agent.ensures.Load(), w.agent.starts.Load(); e != 1 || s != 1 {
		t.Errorf("%d calls, %d daemons; want one of each", e, s)
	}
	round()
	if e := w.agent.ensures.Load(); e != 1 {
		t.Errorf("%d calls after the start: requests must not add any", e)
	}
	w.agent.kill()
	round()
	if s := w.agent.starts.Load(); s != 2 {
		t.Errorf("%d daemons after a crash, want 2", s)
	}
	w.awaitUse(0)
}

func TestNoDocker(t *testing.T) {
	w := newWorld(t, func(p *Params) { p.startLimit = 200 * time.Millisecond }).running()
	for said, want := range map[string]string{
		"missing runtime binaries under /usr/bin: dockerd": "hutch template build docker",
		"dockerd exited 1: no space left":                  "no space left",
	} {
		w.agent.failWith.Store(&said)
		code, body := w.do(w.client(), "GET", "/v1.41/containers/json", nil)
		var m struct{ Message string }
		if err := json.Unmarshal([]byte(body), &m); err != nil || code < 500 || !strings.Contains(m.Message, want) || !strings.Contains(m.Message, "sb-abc") {
			t.Errorf("%d %s, %v; want %q", code, body, err, want)
		}
	}
	w.agent.failWith.Store(nil)
	w.agent.slow.Store(1 << 30)
	if code, body := w.do(w.client(), "GET", "/_ping", nil); code != http.StatusGatewayTimeout || !strings.Contains(body, "on its way") {
		t.Errorf("%d %s", code, body)
	}
	w.agent.slow.Store(0)
	if code, body := w.do(w.client(), "GET", "/_ping", nil); code != 200 {
		t.Errorf("%d %s", code, body)
	}
}

// TestStates: what a client hears of a sandbox that can't be used, and that one
// that sleeps lightly is woken.
func TestStates(t *testing.T) {
	w := newWorld(t).running()
	c := w.client()
	for _, s := range []sandbox.State{sandbox.Paused, sandbox.Stopped} {
		w.become(boxID, s)
		code, body := w.do(c, "GET", "/_ping", nil)
		if code != 503 || !strings.Contains(body, string(s)+"; resume it first") {
			t.Errorf("%s: %d %s", s, code, body)
		}
	}
	w.become(boxID, sandbox.Paused)
	w.boxes.change(boxID, func(b *fakeBox) { b.spec.AutoResume = true })
	if code, body := w.do(c, "GET", "/_ping", nil); code != 200 {
		t.Errorf("a light sleeper: %d %s", code, body)
	}
	w.awaitUse(0) // though the client keeps its connection
}

func TestHalfClose(t *testing.T) {
	w := newWorld(t).running()
	n := 1000
	if testing.Short() {
		n = 100
	}
	for i := range n {
		path, header := "/containers/cat/attach?stream=1&stdin=1", upgrade
		if i%10 == 9 {
			header = "" // as old clients do
		}
		c, r, res := w.attach(path, header)
		if header != "" && (res.StatusCode != 101 || res.Status != "101 UPGRADED" || res.Header.Get("Upgrade") != "tcp") {
			t.Fatalf("%d: %s %v", i, res.Status, res.Header)
		}
		fmt.Fprintf(c, "line %d\n", i)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != fmt.Sprintf("line %d\n", i) {
			t.Fatalf("%d: %q, %v", i, b, err)
		}
		_ = c.Close()
	}
	w.awaitUse(0)
}

// TestEarlyInput: bytes right behind the request are the container's.
func TestEarlyInput(t *testing.T) {
	w := newWorld(t).running()
	c, err := net.Dial("unix", w.path(boxID))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	body := `{"Detach":false}`
	fmt.Fprintf(c, "POST /v1.41/exec/body/start HTTP/1.1\r\nHost: docker\r\n%sContent-Length: %d\r\n\r\n%searly", upgrade, len(body), body)
	r := bufio.NewReader(c)
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != `{"DETACH":FALSE}` {
		t.Errorf("%q, %v", b, err)
	}
	c2, _ := net.Dial("unix", w.path(boxID))
	defer c2.Close()
	fmt.Fprintf(c2, "POST /containers/cat/attach HTTP/1.1\r\nHost: docker\r\n%s\r\nearly", upgrade)
	r = bufio.NewReader(c2)
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	_ = c2.(*net.UnixConn).CloseWrite()
	if b, err := io.ReadAll(r); err != nil || string(b) != "early" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestBulkThroughInput(t *testing.T) {
	w := newWorld(t).running()
	size := int64(256 << 20)
	if testing.Short() {
		size = 16 << 20
	}
	want := digest(&pattern{n: size})
	c, r, _ := w.attach("/containers/sum/attach", upgrade)
	if _, err := io.Copy(c, &pattern{n: size}); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	if got, err := io.ReadAll(r); err != nil || string(got) != want {
		t.Errorf("%s, %v; want %s", got, err, want)
	}
	if code, got := w.do(w.client(), "POST", "/build", &pattern{n: size / 4}); code != 200 || got != digest(&pattern{n: size / 4}) {
		t.Errorf("a chunked body: %d %s", code, got)
	}
	if _, got := w.do(w.client(), "GET", "/bulk", nil); digest(strings.NewReader(got)) != digest(&pattern{n: 64 << 20}) {
		t.Error("an answer of 64 MiB differs")
	}
}

// TestContainerLeavesInputBehind is `yes | docker run -i alpine head`.
func TestContainerLeavesInputBehind(t *testing.T) {
	w := newWorld(t).running()
	for range 20 {
		c, r, _ := w.attach("/containers/head/attach", upgrade)
		var sending sync.WaitGroup
		sending.Go(func() {
			for {
				if _, err := c.Write(bytes.Repeat([]byte("y\n"), 1<<10)); err != nil {
					return
				}
			}
		})
		b, err := io.ReadAll(r)
		if err != nil || digest(bytes.NewReader(b)) != digest(&pattern{n: 1 << 20}) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		_ = c.Close()
		sending.Wait()
	}
	c, r, _ := w.attach("/containers/mute/attach", upgrade)
	if b, err := io.ReadAll(r); err != nil || string(b) != "bye" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Errorf("a container that ended its side: %v", err)
	}
	_ = c.Close()
	w.awaitUse(0)
}

// TestClientGone: a client that is killed does not hold the sandbox, whatever
// its container does.
func TestClientGone(t *testing.T) {
	w := newWorld(t).running()
	for _, half := range []bool{false, true} {
		c, _, _ := w.attach("/containers/silent/attach", upgrade)
		w.awaitUse(1)
		if half {
			_ = c.CloseWrite()
		}
		_ = c.Close()
		w.awaitUse(0)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, "GET", "http://docker/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := w.client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if line, err := bufio.NewReader(res.Body).ReadString('\n'); err != nil || line != "first\n" {
		t.Errorf("%q, %v: a stream must not be held back", line, err)
	}
	w.awaitUse(1)
	cancel()
	w.awaitUse(0)
}

func TestErrorsOfTheDaemon(t *testing.T) {
	w := newWorld(t).running()
	c := w.client()
	for range 2 { // on one connection
		if code, body := w.do(c, "POST", "/containers/none/attach", nil); code != 404 || !strings.Contains(body, "No such container") {
			t.Errorf("%d %s", code, body)
		}
	}
	if code, body := w.do(w.client(), "POST", "/early", &pattern{n: 64 << 20}); code != 400 || !strings.Contains(body, "wants no more") {
		t.Errorf("an answer before the end of the request: %d %s", code, body)
	}
	if code, _ := w.do(c, "HEAD", "/_ping", nil); code != 200 {
		t.Errorf("HEAD: %d", code)
	}
}

// TestDestroyedWhileConnected: all ends, and nothing is left.
func TestDestroyedWhileConnected(t *testing.T) {
	w := newWorld(t).running()
	var readers sync.WaitGroup
	for i := range 20 {
		path := "/containers/silent/attach"
		if i%2 == 0 {
			path = "/containers/cat/attach"
		}
		_, r, _ := w.attach(path, upgrade)
		readers.Go(func() { _, _ = io.ReadAll(r) })
	}
	idle := w.client()
	if code, _ := w.do(idle, "GET", "/_ping", nil); code != 200 {
		t.Error(code)
	}
	w.awaitUse(20)
	w.become(boxID, sandbox.Gone)
	readers.Wait()
	w.await(boxID, false)
	if left, _ := os.ReadDir(w.dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestDaemonDiesWhileConnected(t *testing.T) {
	w := newWorld(t).running()
	_, r, _ := w.attach("/containers/cat/attach", upgrade)
	w.agent.kill()
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("a daemon's end: %v, want EOF as from its own socket", err)
	}
	if code, _ := w.do(w.client(), "GET", "/_ping", nil); code != 200 {
		t.Error(code)
	}
}

func TestTooManyRequests(t *testing.T) {
	w := newWorld(t).running()
	for range maxRequests {
		w.attach("/containers/silent/attach", upgrade)
	}
	if code, body := w.do(w.client(), "GET", "/_ping", nil); code != 503 || !strings.Contains(body, "most allowed") {
		t.Errorf("%d %s", code, body)
	}
}

// TestServeTunnel serves connections that came another way.
func TestServeTunnel(t *testing.T) {
	w := newWorld(t)
	near, far := net.Pipe()
	defer near.Close()
	if err := w.sockets.Serve(boxID, far); !fault.Is(err, fault.Precondition) {
		t.Errorf("no such sandbox: %v", err)
	}
	w.boxes.set(boxID, sandbox.Running)
	if err := os.MkdirAll(filepath.Join(w.dir, string(boxID)), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.sockets.Serve(boxID, served); err != nil { // before any event
			t.Error(err)
		}
	})
	r := bufio.NewReader(c)
	for range 3 {
		fmt.Fprint(c, "GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n")
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(res.Body); string(b) != "OK" {
			t.Errorf("%q", b)
		}
	}
	fmt.Fprintf(c, "POST /containers/cat/attach HTTP/1.1\r\nHost: docker\r\n%s\r\nover TCP", upgrade)
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	_ = c.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(r); err != nil || string(b) != "over TCP" {
		t.Errorf("%q, %v", b, err)
	}
	_ = c.Close()
	wg.Wait()
}

// fakePorts is a host's ports.
type fakePorts struct {
	mu    sync.Mutex
	held  map[string][]Binding // by owner
	taken bool
	err   error
}

func (p *fakePorts) Reserve(_ context.Context, id sandbox.ID, owner, name string, bindings []Binding) (func(), error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken {
		return nil, fault.New(fault.Exists, "listen tcp4 0.0.0.0:8080: bind: address already in use")
	}
	if p.err != nil {
		return nil, p.err
	}
	key := string(id) + " " + owner + " " + name
	p.held[key] = bindings
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.held, key)
	}, nil
}

// Choose gives the numbers of a range from its end, and 40000 and up; none for
// addresses that are not loopback.
func (p *fakePorts) Choose(_ context.Context, id sandbox.ID, name string, wishes []Wish) ([]uint16, func(), error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken {
		return nil, nil, fault.New(fault.Exists, "listen tcp4 0.0.0.0:8000: bind: address already in use")
	}
	if p.err != nil {
		return nil, nil, p.err
	}
	var numbers []uint16
	key := string(id) + " new " + name
	for i, w := range wishes {
		n := w.Last
		if n == 0 {
			n = uint16(40000 + i)
		}
		if w.HostIP == "10.0.0.1" {
			n = 0
		}
		numbers = append(numbers, n)
		p.held[key] = append(p.held[key], Binding{w.Protocol, w.HostIP, n, w.ContainerPort})
	}
	return numbers, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.held, key)
	}, nil
}

func (p *fakePorts) holds() map[string][]Binding {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := map[string][]Binding{}
	for k, v := range p.held {
		held[k] = v
	}
	return held
}

func TestStartsReservePorts(t *testing.T) {
	ports := &fakePorts{held: map[string][]Binding{}}
	w := newWorld(t, func(p *Params) { p.Ports = ports }).running()
	c := w.client()
	want := map[string][]Binding{"sb-abc " + containerHex + " web": {
		{"udp", "::", 53, 53}, {"tcp", "", 8080, 80}, {"tcp", "127.0.0.1", 8081, 80},
	}}
	for _, path := range []string{"/containers/web/start", "/containers/web/restart?t=5"} {
		if code, body := w.do(c, "POST", path, nil); code != 204 {
			t.Fatalf("%s: %d %s", path, code, body)
		}
		if d := cmp.Diff(want, ports.holds()); d != "" {
			t.Error(d)
		}
	}
	clear(ports.held)
	for path, code := range map[string]int{
		"/containers/broken/start": 500, "/containers/none/start": 404, "/containers/host/start": 204, "/containers/odd/start": 503,
	} {
		if got, body := w.do(c, "POST", path, nil); got != code {
			t.Errorf("%s: %d %s", path, got, body)
		}
		if held := ports.holds(); len(held) != 0 {
			t.Errorf("%s leaves %v", path, held)
		}
	}
	ports.taken = true
	code, body := w.do(c, "POST", "/containers/web/start", nil)
	text := "driver failed programming external connectivity on endpoint web (" + containerHex +
		"): Error starting userland proxy: listen tcp4 0.0.0.0:8080: bind: address already in use"
	if code != 500 || body != fmt.Sprintf("{\"message\":%q}\n", text) {
		t.Errorf("a port that is taken: %d %s", code, body)
	}
	ports.taken, ports.err = false, errors.New("out of descriptors")
	if code, body := w.do(c, "POST", "/containers/web/start", nil); code < 500 || !strings.Contains(body, "out of descriptors") {
		t.Errorf("ports that can't be reserved: %d %s", code, body)
	}
	if code, _ := w.do(c, "GET", "/_ping", nil); code != 200 {
		t.Error(code)
	}
	w.awaitUse(0)
}

// TestNewContainersHaveTheirPortsChosen by the host, and everything else in the
// request gets through as it was.
func TestNewContainersHaveTheirPortsChosen(t *testing.T) {
	ports := &fakePorts{held: map[string][]Binding{}}
	w := newWorld(t, func(p *Params) { p.Ports = ports }).running()
	c := w.client()
	for _, tc := range []struct{ name, in, want string }{
		{"nothing to choose", `{"HostConfig":{"PortBindings":{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}}}`, ""},
		{"no ports", `{"Image":"app","HostConfig":null}`, ""},
		{"no request", `{`, ""},
		{"another's network", `{"HostConfig":{"NetworkMode":"container:x","PublishAllPorts":true,"PortBindings":{"80/tcp":[{}]}}}`, ""},
		{"any, a range and a number", `{"Odd":1.50,"HostConfig":{"Memory":9007199254740993,"PortBindings":` +
			`{"80/tcp":[{"HostPort":""},{"HostPort":"8080"},{"HostIp":"127.0.0.1","HostPort":"8000-8010"}],"53/udp":[{"HostPort":"0"}],"9/sctp":[{}]}}}`,
			`{"HostConfig":{"Memory":9007199254740993,"PortBindings":` +
				`{"53/udp":[{"HostIp":"","HostPort":"40000"}],"80/tcp":[{"HostIp":"","HostPort":"40001"},{"HostIp":"","HostPort":"8080"},{"HostIp":"127.0.0.1","HostPort":"8010"}],` +
				`"9/sctp":[{"HostIp":"","HostPort":""}]}},"Odd":1.50}`},
		{"what the host does not open", `{"HostConfig":{"PortBindings":{"80":[{"HostIp":"10.0.0.1"},{"HostIp":"what?"},{"HostPort":"9-8"}]}}}`,
			`{"HostConfig":{"PortBindings":{"80":[{"HostIp":"10.0.0.1","HostPort":""},{"HostIp":"what?","HostPort":""},{"HostIp":"","HostPort":"9-8"}]}}}`},
		{"all that is exposed", `{"Image":"a/b:1","ExposedPorts":{"90/tcp":{}},"HostConfig":{"PublishAllPorts":true,"PortBindings":{"70/tcp":[{"HostPort":"7070"}]}}}`,
			`{"ExposedPorts":{"90/tcp":{}},"HostConfig":{"PortBindings":{"70/tcp":[{"HostIp":"","HostPort":"7070"}],"80/tcp":[{"HostIp":"","HostPort":"40000"}],` +
				`"90/tcp":[{"HostIp":"","HostPort":"40001"}]},"PublishAllPorts":true},"Image":"a/b:1"}`},
		{"an image that is not there", `{"Image":"none","HostConfig":{"PublishAllPorts":true}}`, ""},
	} {
		if tc.want == "" {
			tc.want = tc.in
		}
		code, got := w.do(c, "POST", "/v1.41/containers/create?name=web", strings.NewReader(tc.in))
		if code != 201 || got != tc.want {
			t.Errorf("%s: %d\n got %s\nwant %s", tc.name, code, got, tc.want)
		}
	}
	if held := ports.holds(); len(held) != 1 {
		t.Errorf("held: %v", held)
	}
	clear(ports.held)
	const any = `{"HostConfig":{"PortBindings":{"80/tcp":[{}]}}}`
	if code, body := w.do(c, "POST", "/containers/create?name=refused", strings.NewReader(any)); code != 409 || len(ports.holds()) != 0 {
		t.Errorf("a container that is not made: %d %s, held %v", code, body, ports.holds())
	}
	ports.taken = true
	if code, body := w.do(c, "POST", "/containers/create", strings.NewReader(any)); code != 500 || !strings.Contains(body, "a new container: Error starting userland proxy: listen tcp4") {
		t.Errorf("no number is free: %d %s", code, body)
	}
	ports.taken, ports.err = false, errors.New("out of descriptors")
	if code, body := w.do(c, "POST", "/containers/create", strings.NewReader(any)); code < 500 || !strings.Contains(body, "out of descriptors") {
		t.Errorf("ports that can't be chosen: %d %s", code, body)
	}
	if code, body := w.do(c, "POST", "/containers/create", &pattern{n: maxCreate + 1}); code != 400 {
		t.Errorf("a request without an end: %d %s", code, body)
	}
	w.awaitUse(0)
}

func TestManyClients(t *testing.T) {
	w := newWorld(t).running()
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			for j := range 5 {
				c, r, res, err := w.tryAttach("/containers/cat/attach", upgrade)
				if err != nil || res.StatusCode != 101 {
					t.Errorf("client %d: %v", i, err)
					return
				}
				msg := bytes.Repeat(fmt.Appendf(nil, "client %d, turn %d; ", i, j), 2000)
				sent := make(chan error, 1)
				go func() {
					_, err := c.Write(msg)
					sent <- errors.Join(err, c.CloseWrite())
				}()
				got, err := io.ReadAll(r)
				if err = errors.Join(err, <-sent); err != nil || !bytes.Equal(got, msg) {
					t.Errorf("client %d: %d of %d bytes, %v", i, len(got), len(msg), err)
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	w.awaitUse(0)
}
