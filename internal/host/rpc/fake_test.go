package rpc

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/auth"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/metrics"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// boxes is sandboxes without machines, by the rules of package sandbox.
type boxes struct {
	mu      sync.Mutex
	list    []*lifecycle.View
	changed chan struct{} // closed and made anew at each change
	events  *events.Log
	exec    func(context.Context, guestconn.Exec) (guestconn.Result, error)
	specs   []sandbox.Spec
}

func (b *boxes) change(v *lifecycle.View, s sandbox.State) {
	b.events.Append(sandbox.Event{Time: time.Now(), ID: v.ID, State: s, Previous: v.State, Cause: sandbox.ByUser})
	v.State = s
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *boxes) find(id sandbox.ID) (int, error) {
	for i, v := range b.list {
		if v.ID == id {
			return i, nil
		}
	}
	return 0, fault.New(fault.NotFound, "sandbox %s does not exist", id)
}

func (b *boxes) Create(_ context.Context, id sandbox.ID, spec sandbox.Spec) (lifecycle.View, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.specs = append(b.specs, spec)
	if spec.Template == "nope" {
		return lifecycle.View{}, fault.New(fault.NotFound, "template nope does not exist")
	}
	if id == "" {
		id = sandbox.NewID()
	}
	if _, err := b.find(id); err == nil {
		return lifecycle.View{}, fault.New(fault.Exists, "sandbox %s exists", id)
	}
	now := time.Unix(1700000000, 0)
	v := &lifecycle.View{Record: sandbox.Record{
		ID: id, Spec: spec.WithDefaults(), HostIP: "198.19.0.1", CreatedAt: now, ActiveAt: now,
		ImageDigest: "sha256:1", Env: map[string]string{"A": "template", "B": "template"}, User: "root",
		Stages: []sandbox.Stage{{Name: "launch", Took: 1500 * time.Microsecond}},
	}}
	b.list = append(b.list, v)
	b.change(v, sandbox.Running)
	return *v, nil
}

func (b *boxes) request(id sandbox.ID, r sandbox.Request, to sandbox.State) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	i, err := b.find(id)
	if err != nil {
		return err
	}
	verdict, why := sandbox.Decide(b.list[i].State, r)
	switch verdict {
	case sandbox.Deny:
		return fault.New(fault.Precondition, "%s", why)
	case sandbox.Accept:
		b.change(b.list[i], to)
	case sandbox.Already, sandbox.Wait:
	}
	if to == sandbox.Gone {
		b.list = append(b.list[:i:i], b.list[i+1:]...)
	}
	return nil
}

func (b *boxes) Destroy(_ context.Context, id sandbox.ID) error {
	return b.request(id, sandbox.Destroy, sandbox.Gone)
}
func (b *boxes) Pause(_ context.Context, id sandbox.ID) error {
	return b.request(id, sandbox.Pause, sandbox.Paused)
}
func (b *boxes) Hibernate(_ context.Context, id sandbox.ID) error {
	return b.request(id, sandbox.Hibernate, sandbox.Hibernated)
}

func (b *boxes) Resume(_ context.Context, id sandbox.ID) error {
	return b.request(id, sandbox.Resume, sandbox.Running)
}
func (b *boxes) KeepAlive(_ context.Context, id sandbox.ID) error {
	_, err := b.Get(string(id))
	return err
}

func (b *boxes) Use(_ context.Context, id sandbox.ID) (guestconn.Guest, func(), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i, err := b.find(id)
	if err != nil {
		return nil, nil, err
	}
	v := b.list[i]
	if verdict, why := sandbox.Decide(v.State, sandbox.Use); verdict == sandbox.Deny {
		return nil, nil, fault.New(fault.Precondition, "%s", why)
	}
	v.InFlight++
	return &guest{run: b.exec}, sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		v.InFlight--
	}), nil
}

func (b *boxes) List() []lifecycle.View {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []lifecycle.View
	for _, v := range b.list {
		list = append(list, *v)
	}
	return list
}

func (b *boxes) Get(idOrPrefix string) (lifecycle.View, error) {
	var found []lifecycle.View
	for _, v := range b.List() {
		if strings.HasPrefix(string(v.ID), idOrPrefix) {
			found = append(found, v)
		}
	}
	if len(found) != 1 {
		return lifecycle.View{}, fault.New(fault.NotFound, "sandbox %s does not exist", idOrPrefix)
	}
	return found[0], nil
}

func (b *boxes) Wait(ctx context.Context, id sandbox.ID, states ...sandbox.State) (lifecycle.View, error) {
	for {
		b.mu.Lock()
		changed := b.changed
		i, err := b.find(id)
		view := lifecycle.View{Record: sandbox.Record{ID: id, State: sandbox.Gone}}
		if err == nil {
			view = *b.list[i]
		}
		b.mu.Unlock()
		for _, s := range append(states, sandbox.Gone) {
			if view.State == s {
				return view, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return lifecycle.View{}, ctx.Err()
		}
	}
}

// guest runs commands by a function.
type guest struct {
	guestconn.Guest
	run func(context.Context, guestconn.Exec) (guestconn.Result, error)
}

func (g *guest) Exec(ctx context.Context, e guestconn.Exec) (guestconn.Result, error) {
	return g.run(ctx, e)
}
func (g *guest) Transport() http.RoundTripper {
	return roundTrip(func(r *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Proto: "HTTP/2.0", ProtoMajor: 2, Header: http.Header{}, Request: r,
			Body: io.NopCloser(strings.NewReader("guest " + r.URL.Path))}, nil
	})
}

func (g *guest) DialPort(context.Context, uint16) (net.Conn, error) {
	return nil, fault.As(fault.Unavailable, &link.StatusError{Status: link.StatusRefused})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// shelf is templates without images.
type shelf struct {
	build    func(ctx context.Context, b BuildTemplate, progress func(string, int64, int64)) (TemplateInfo, error)
	imported []byte
	header   ImportTemplate
}

func minimal() TemplateInfo {
	return TemplateInfo{Template: template.Template{Name: "minimal", ImageDigest: "sha256:1", Source: "recipe:minimal", SizeBytes: 10}, DiskBytes: 5}
}

func (s *shelf) Build(ctx context.Context, b BuildTemplate, progress func(string, int64, int64)) (TemplateInfo, error) {
	return s.build(ctx, b, progress)
}
func (s *shelf) Import(_ context.Context, i ImportTemplate) (TemplateInfo, error) {
	s.header = i
	var err error
	s.imported, err = io.ReadAll(i.Archive)
	t := minimal()
	t.Name = i.Name
	return t, err
}
func (s *shelf) List(context.Context) ([]TemplateInfo, error) { return []TemplateInfo{minimal()}, nil }
func (s *shelf) Inspect(_ context.Context, name string) (TemplateInfo, error) {
	if name != "minimal" {
		return TemplateInfo{}, fault.New(fault.NotFound, "template %s does not exist", name)
	}
	return minimal(), nil
}
func (s *shelf) Remove(ctx context.Context, name string) error {
	_, err := s.Inspect(ctx, name)
	return err
}

type fakeHost struct{}

func (fakeHost) Info(context.Context) (HostInfo, error) {
	return HostInfo{Version: "1", CPUs: 2, StartedAt: time.Unix(5, 0)}, nil
}
func (fakeHost) Diagnose(context.Context) ([]Check, error) {
	return []Check{{Name: "kvm", Result: "warning", Detail: "no", Advice: "use it"}}, nil
}

// world is the API on a loopback port.
type world struct {
	*boxes
	shelf  *shelf
	stills *stills
	api    *API
	server *http.Server
	addr   string
	logs   string
}

func newWorld(t *testing.T, change ...func(*Params)) *world {
	t.Helper()
	testenv.CheckGoroutines(t)
	log, err := events.Open(events.Params{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	w := &world{boxes: &boxes{changed: make(chan struct{}), events: log, exec: shell}, shelf: &shelf{}, stills: &stills{}, logs: t.TempDir()}
	m := metrics.New(metrics.Params{Version: "1", Snapshot: func() metrics.Levels { return metrics.Levels{} }})
	p := Params{
		Sandboxes: w.boxes, Templates: w.shelf, Snapshots: w.stills, Ports: published{}, Host: fakeHost{}, Subscribe: log.Subscribe,
		LogPath: func(id sandbox.ID, s LogSource) string { return filepath.Join(w.logs, string(id)+"-"+string(s)+".log") },
		Trim: func(context.Context, sandbox.ID) (lifecycle.Trimmed, error) {
			return lifecycle.Trimmed{Guest: 5, Host: 3, Detail: "/: 5 bytes"}, nil
		},
		Stats: func(context.Context, sandbox.ID) (Stats, error) { return Stats{CPU: time.Second, RSS: 7}, nil },
		Meter: m, ProxyMeter: m, Metrics: m.Handler(), Log: slog.New(slog.DiscardHandler),
	}
	for _, c := range change {
		c(&p)
	}
	if w.api, err = New(p); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), ListenParams{Address: Address{Host: "127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	w.server = NewServer(w.api, p.Log)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(l) }()
	t.Cleanup(func() {
		w.server.Close()
		w.api.Close()
		<-served
	})
	return w
}

// shell is a guest that knows two commands.
func shell(ctx context.Context, e guestconn.Exec) (guestconn.Result, error) {
	switch e.Cmd {
	case "echo":
		return guestconn.Result{Stdout: []byte(strings.Join(e.Args, " ") + "\n")}, nil
	case "big":
		return guestconn.Result{Stdout: bytes.Repeat([]byte{0xff}, e.MaxOutput), Stderr: bytes.Repeat([]byte{0xfe}, e.MaxOutput), StdoutTruncated: true}, nil
	case "env":
		out, err := json.Marshal(e)
		return guestconn.Result{Stdout: out}, err
	case "killed":
		return guestconn.Result{Stdout: []byte("part"), ExitCode: 137, Signal: "SIGKILL", TimedOut: true}, nil
	case "starved":
		return guestconn.Result{ExitCode: 137, Signal: "SIGKILL", OOMKilled: true}, nil
	case "wait":
		<-ctx.Done()
		return guestconn.Result{}, ctx.Err()
	}
	return guestconn.Result{}, fault.BadField("cmd", "%s is not there", e.Cmd)
}

// client returns an HTTP client of one protocol version.
func (w *world) client(t *testing.T, http2 bool) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!http2)
	tr.Protocols.SetUnencryptedHTTP2(http2)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (w *world) url() string { return "http://" + w.addr }

// curl posts JSON as curl does, and returns status, head and answer.
func (w *world) curl(t *testing.T, procedure, body string, header ...string) (int, http.Header, map[string]any) {
	t.Helper()
	req, err := http.NewRequestWithContext(testenv.Context(t), "POST", w.url()+"/hostagent.v1."+procedure, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := w.client(t, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatalf("%s: %d %q: %v", procedure, res.StatusCode, raw, err)
	}
	return res.StatusCode, res.Header, m
}

func testTokens(t *testing.T) []auth.Token {
	t.Helper()
	var list []auth.Token
	for name, role := range map[string]auth.Role{"admin": auth.Admin, "read": auth.Read} {
		tok, err := auth.NewToken(name, role, secretOf(name))
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, tok)
	}
	return list
}

func secretOf(name string) string { return fmt.Sprintf("%s-%032d", name, 7) }
