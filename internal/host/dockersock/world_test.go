package dockersock

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

const boxID = sandbox.ID("sb-abc")

// world is the sockets of fake sandboxes, with one guest behind them all: an
// agent of test handlers behind a real link, and a dockerd of test handlers.
type world struct {
	t       *testing.T
	dir     string
	log     *events.Log
	sockets *Sockets
	boxes   *fakeBoxes
	agent   *agent
}

func newWorld(t *testing.T, change ...func(*Params)) *world {
	t.Helper()
	testenv.CheckGoroutines(t)
	dir, err := os.MkdirTemp("", "ds") // a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: filepath.Join(dir, "sandboxes"), agent: startAgent(t, filepath.Join(dir, "guest.sock"))}
	if err := os.Mkdir(filepath.Join(dir, "events"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.log, err = events.Open(events.Params{Dir: filepath.Join(dir, "events"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.log.Close() })
	w.boxes = &fakeBoxes{all: map[sandbox.ID]*fakeBox{}, guest: w.agent.guest, changed: make(chan struct{})}
	w.start(change...)
	t.Cleanup(func() { w.stop() })
	return w
}

// start starts a hutchd's Docker sockets.
func (w *world) start(change ...func(*Params)) {
	w.t.Helper()
	p := Params{Sandboxes: w.boxes, Subscribe: w.log.Subscribe, Dir: w.dir, Log: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&p)
	}
	s, err := New(p)
	if err == nil {
		err = s.Start()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.sockets = s
}

func (w *world) stop() {
	if err := w.sockets.Close(); err != nil {
		w.t.Error(err)
	}
}

// become moves a sandbox as lifecycle does: its run directory, its record, and
// then the event.
func (w *world) become(id sandbox.ID, state sandbox.State) {
	w.t.Helper()
	dir := filepath.Join(w.dir, string(id))
	switch state {
	case sandbox.Running:
		if err := os.MkdirAll(dir, 0o700); err != nil {
			w.t.Fatal(err)
		}
	case sandbox.Gone:
		if err := os.RemoveAll(dir); err != nil {
			w.t.Fatal(err)
		}
	}
	w.boxes.set(id, state)
	w.log.Append(sandbox.Event{ID: id, State: state, Time: time.Now()})
}

func (w *world) path(id sandbox.ID) string { return filepath.Join(w.dir, string(id), "docker.sock") }

// await waits until somebody listens at the socket of id, or nobody does.
func (w *world) await(id sandbox.ID, listening bool) {
	w.t.Helper()
	for late := time.Now().Add(20 * time.Second); ; {
		c, err := net.Dial("unix", w.path(id))
		if err == nil {
			_ = c.Close()
		}
		if (err == nil) == listening {
			return
		}
		if time.Now().After(late) {
			w.t.Fatalf("socket of %s: %v, want listening %v", id, err, listening)
		}
		<-time.After(time.Millisecond) // files tell no events here
	}
}

// running makes boxID run with its socket there.
func (w *world) running() *world {
	w.t.Helper()
	w.become(boxID, sandbox.Running)
	w.await(boxID, true)
	return w
}

// client speaks with the socket of boxID.
func (w *world) client() *http.Client {
	tr := &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", w.path(boxID))
	}}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (w *world) do(c *http.Client, method, path string, body io.Reader) (int, string) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(testenv.Context(w.t), method, "http://docker"+path, body)
	if err != nil {
		w.t.Fatal(err)
	}
	res, err := c.Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// attach hijacks a connection as docker's client does.
func (w *world) attach(path string, header ...string) (*net.UnixConn, *bufio.Reader, *http.Response) {
	w.t.Helper()
	c, r, res, err := w.tryAttach(path, header...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c, r, res
}

func (w *world) tryAttach(path string, header ...string) (*net.UnixConn, *bufio.Reader, *http.Response, error) {
	c, err := net.Dial("unix", w.path(boxID))
	if err != nil {
		return nil, nil, nil, err
	}
	_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\n%s\r\n", path, strings.Join(header, ""))
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, &http.Request{Method: "POST"})
	if err != nil {
		_ = c.Close()
		return nil, nil, nil, err
	}
	return c.(*net.UnixConn), r, res, nil
}

const upgrade = "Connection: Upgrade\r\nUpgrade: tcp\r\n"

// fakeBoxes are sandboxes without machines.
type fakeBoxes struct {
	guest guestconn.Guest

	mu      sync.Mutex
	all     map[sandbox.ID]*fakeBox
	changed chan struct{} // closed and made anew when a use begins or ends
}

type fakeBox struct {
	spec        sandbox.Spec
	state       sandbox.State
	inUse, used int
}

func (b *fakeBoxes) view(id sandbox.ID) lifecycle.View {
	return lifecycle.View{Record: sandbox.Record{ID: id, State: b.all[id].state, Spec: b.all[id].spec}}
}

func (b *fakeBoxes) List() []lifecycle.View {
	b.mu.Lock()
	defer b.mu.Unlock()
	var views []lifecycle.View
	for id := range b.all {
		views = append(views, b.view(id))
	}
	return views
}

func (b *fakeBoxes) Get(idOrPrefix string) (lifecycle.View, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all[sandbox.ID(idOrPrefix)] != nil {
		return b.view(sandbox.ID(idOrPrefix)), nil
	}
	for id := range b.all {
		if strings.HasPrefix(string(id), idOrPrefix) {
			return b.view(id), nil
		}
	}
	return lifecycle.View{}, fault.New(fault.NotFound, "no sandbox %q", idOrPrefix)
}

func (b *fakeBoxes) Use(_ context.Context, id sandbox.ID) (guestconn.Guest, func(), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	box := b.all[id]
	if box == nil {
		return nil, nil, fault.New(fault.NotFound, "no sandbox %q", id)
	}
	if box.state == sandbox.Paused && box.spec.AutoResume {
		box.state = sandbox.Running
	}
	if _, why := sandbox.Decide(box.state, sandbox.Use); why != "" {
		return nil, nil, fault.New(fault.Precondition, "%s", why)
	}
	box.inUse, box.used = box.inUse+1, box.used+1
	b.tell()
	return b.guest, sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		box.inUse--
		b.tell()
	}), nil
}

func (b *fakeBoxes) tell() {
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *fakeBoxes) set(id sandbox.ID, state sandbox.State) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case state == sandbox.Gone:
		delete(b.all, id)
	case b.all[id] == nil:
		b.all[id] = &fakeBox{state: state}
	default:
		b.all[id].state = state
	}
}

func (b *fakeBoxes) change(id sandbox.ID, f func(*fakeBox)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(b.all[id])
}

func (w *world) awaitUse(n int) {
	w.t.Helper()
	late := time.After(20 * time.Second)
	for {
		w.boxes.mu.Lock()
		now, changed := w.boxes.all[boxID].inUse, w.boxes.changed
		w.boxes.mu.Unlock()
		if now == n {
			return
		}
		select {
		case <-changed:
		case <-late:
			w.t.Fatalf("sandbox held by %d, want %d", now, n)
		}
	}
}

// agent is a guest: a link with test handlers, and a dockerd that is started
// when asked for.
type agent struct {
	arcboxv1connect.UnimplementedAgentServiceHandler
	t     testing.TB
	path  string
	guest *guestconn.Conn
	wires chan net.Conn

	ensures  atomic.Int32 // calls with start_if_needed
	starts   atomic.Int32 // daemons started
	failWith atomic.Pointer[string]
	slow     atomic.Int32 // how many looks a start takes

	mu     sync.Mutex
	daemon *daemon
	looks  int32
}

type wire struct{ net.Conn }

func (w wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func startAgent(t testing.TB, path string) *agent {
	a := &agent{t: t, path: path, wires: make(chan net.Conn)}
	l, err := link.Listen(link.ListenParams{
		Hello: link.Hello{AgentVersion: "v9"}, Sockets: map[string]string{link.SocketDocker: path},
		Open: func(ctx context.Context) (io.ReadWriteCloser, error) {
			select {
			case c := <-a.wires:
				return wire{c}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(arcboxv1connect.NewAgentServiceHandler(a))
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: mux, Protocols: &p}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	a.guest = guestconn.New(guestconn.Params{Dial: a.dial})
	t.Cleanup(func() {
		_ = a.guest.Close()
		_ = srv.Close()
		_ = l.Close()
		wg.Wait()
		a.kill()
	})
	return a
}

func (a *agent) dial(ctx context.Context) (net.Conn, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			a.t.Error(err)
		}
		_ = f.Close()
	}
	select {
	case a.wires <- ends[1]:
		return ends[0], nil
	case <-ctx.Done():
		_ = ends[0].Close()
		_ = ends[1].Close()
		return nil, ctx.Err()
	}
}

// EnsureRuntime starts the daemon, after some looks.
func (a *agent) EnsureRuntime(_ context.Context, r *connect.Request[arcboxv1.RuntimeEnsureRequest]) (*connect.Response[arcboxv1.RuntimeEnsureResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	answer := func(ready bool, status, message string) (*connect.Response[arcboxv1.RuntimeEnsureResponse], error) {
		return connect.NewResponse(&arcboxv1.RuntimeEnsureResponse{Ready: ready, Status: status, Message: message}), nil
	}
	if r.Msg.GetStartIfNeeded() {
		a.ensures.Add(1)
	}
	if f := a.failWith.Load(); f != nil {
		return answer(false, "failed", *f)
	}
	if a.daemon != nil {
		return answer(true, "reused", "")
	}
	if a.looks++; a.looks <= a.slow.Load() {
		return answer(false, "starting", "on its way")
	}
	a.looks = 0
	a.starts.Add(1)
	a.daemon = startDaemon(a.t, a.path)
	return answer(true, "started", "")
}

// kill ends the daemon with all its connections, as a crash would.
func (a *agent) kill() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.daemon != nil {
		a.daemon.stop()
		a.daemon = nil
	}
}

func digest(r io.Reader) string {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", n, hex.EncodeToString(h.Sum(nil)))
}

// pattern is n bytes that no mix-up leaves as they are.
type pattern struct{ n, at int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at == p.n {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.n-p.at)]
	for i := range b {
		b[i] = byte(uint64(p.at+int64(i)) * 0x9E3779B97F4A7C15 >> 32)
	}
	p.at += int64(len(b))
	return len(b), nil
}

// daemon is a dockerd of test handlers.
type daemon struct {
	t        testing.TB
	srv      *http.Server
	running  sync.WaitGroup
	hijacked sync.Map // net.Conn
}

func startDaemon(t testing.TB, path string) *daemon {
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Error(err)
		return nil
	}
	d := &daemon{t: t}
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		_, _ = io.WriteString(w, "OK")
	})
	mux.HandleFunc("POST /build", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, digest(r.Body)) })
	mux.HandleFunc("POST /early", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"message":"wants no more"}`)
	})
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "first\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("GET /bulk", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, &pattern{n: 64 << 20}) })
	mux.HandleFunc("POST /containers/{id}/attach", d.attach)
	mux.HandleFunc("POST /v1.41/exec/{id}/start", d.attach)
	mux.HandleFunc("GET /containers/{id}/json", inspectContainer)
	mux.HandleFunc("POST /containers/{id}/start", startContainer)
	mux.HandleFunc("POST /containers/create", createContainer)
	mux.HandleFunc("POST /v1.41/containers/create", createContainer)
	mux.HandleFunc("GET /v1.41/images/a/b:1/json", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"Config":{"ExposedPorts":{"70/tcp":{},"80/tcp":{},"9/sctp":{}}}}`)
	})
	mux.HandleFunc("POST /containers/{id}/restart", startContainer)
	d.srv = &http.Server{Handler: mux}
	d.running.Go(func() { _ = d.srv.Serve(l) })
	return d
}

func (d *daemon) stop() {
	_ = d.srv.Close()
	d.hijacked.Range(func(c, _ any) bool { _ = c.(net.Conn).Close(); return true })
	d.running.Wait()
}

// attach is a container that answers by its name, once it has started to read.
func (d *daemon) attach(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	if id == "none" {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"message":"No such container: none"}`)
		return
	}
	body, _ := io.ReadAll(r.Body)
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		d.t.Error(err)
		return
	}
	defer conn.Close()
	d.hijacked.Store(conn, true)
	defer d.hijacked.Delete(conn)
	if r.Header.Get("Upgrade") != "" {
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
	} else {
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n")
	}
	in := io.MultiReader(io.LimitReader(buf.Reader, int64(buf.Reader.Buffered())), conn)
	half := conn.(*net.UnixConn)
	switch id {
	case "cat":
		_, _ = io.Copy(struct{ io.Writer }{conn}, in)
	case "sum":
		_, _ = io.WriteString(conn, digest(in))
	case "head": // answers and ends without reading the rest
		_, _ = io.ReadFull(in, make([]byte, 1))
		_, _ = io.Copy(struct{ io.Writer }{conn}, &pattern{n: 1 << 20})
	case "mute": // ends its side first, and listens on
		_, _ = io.WriteString(conn, "bye")
		_ = half.CloseWrite()
		d.heard(digest(in))
	case "body":
		_, _ = conn.Write(bytes.ToUpper(body))
	case "silent":
		_, _ = io.Copy(io.Discard, in)
		<-time.After(20 * time.Millisecond)
		_, _ = io.Copy(io.Discard, conn)
	}
}

func (d *daemon) heard(string) {}

const containerHex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func inspectContainer(w http.ResponseWriter, r *http.Request) {
	switch id := r.PathValue("id"); id {
	case "none":
		http.Error(w, `{"message":"No such container: none"}`, http.StatusNotFound)
	case "odd":
		_, _ = io.WriteString(w, `{"Id":"../../x","Name":"/odd"}`)
	case "host":
		_, _ = io.WriteString(w, `{"Id":"`+containerHex+`","Name":"/host","HostConfig":{"NetworkMode":"host","PortBindings":{"80/tcp":[{"HostPort":"80"}]}}}`)
	default:
		_, _ = io.WriteString(w, `{"Id":"`+containerHex+`","Name":"/`+id+`","State":{},"HostConfig":{"NetworkMode":"default","PortBindings":{`+
			`"80/tcp":[{"HostIp":"","HostPort":"8080"},{"HostIp":"127.0.0.1","HostPort":"8081"}],"53/udp":[{"HostIp":"::","HostPort":"53"}],`+
			`"90/tcp":[{"HostPort":""},{"HostPort":"9000-9010"}],"91/sctp":[{"HostPort":"91"}],"92/tcp":null}}}`)
	}
}

// createContainer answers with what it was asked.
func createContainer(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("name") == "refused" {
		http.Error(w, `{"message":"Conflict. The container name is already in use"}`, http.StatusConflict)
		return
	}
	w.WriteHeader(http.StatusCreated)
	_, _ = io.Copy(w, r.Body)
}

func startContainer(w http.ResponseWriter, r *http.Request) {
	switch r.PathValue("id") {
	case "none":
		http.Error(w, `{"message":"No such container: none"}`, http.StatusNotFound)
	case "broken":
		http.Error(w, `{"message":"no such program"}`, http.StatusInternalServerError)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}
