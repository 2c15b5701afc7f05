package guestconn

import (
	"bytes"
	"context"
	"errors"
	"io"
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
	"google.golang.org/protobuf/proto"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	guestv1 "github.com/hutch-run/hutch/gen/hutch/guest/v1"
	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
)

// agent is a guest agent of test handlers behind a link whose wire the test
// can cut.
type agent struct {
	processpbconnect.UnimplementedProcessHandler
	arcboxv1connect.UnimplementedAgentServiceHandler

	t      testing.TB
	wires  chan net.Conn // the guest's ends of connections
	gone   chan struct{} // the VM has ended
	docker string        // where dockerd would listen
	links  atomic.Int32  // sessions so far
	conns  atomic.Int32  // HTTP connections so far
	gets   atomic.Int32  // requests to /once so far

	mu      sync.Mutex
	host    net.Conn // the host's end of the connection that stands
	inputs  map[string]*input
	configs []*guestv1.ConfigureRequest
	ahead   time.Duration // its clock, of ours
	hello   link.Hello
}

type input struct {
	buf    bytes.Buffer
	closed chan struct{}
}

// wire is one connection as the guest's port. It does not come back.
type wire struct{ net.Conn }

func (w wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func startAgent(t testing.TB) *agent {
	a := &agent{
		t: t, ahead: time.Hour, wires: make(chan net.Conn), gone: make(chan struct{}), inputs: map[string]*input{}, docker: filepath.Join(t.TempDir(), "docker.sock"),
		hello: link.Hello{AgentVersion: "v9", Features: []string{"one", "two"}},
	}
	l, err := link.Listen(link.ListenParams{Hello: a.hello, DialTCP: link.DialLocal, DialUDP: link.DialLocalUDP, Sockets: map[string]string{link.SocketDocker: a.docker}, Calls: map[string]link.CallFunc{link.CallConfigure: a.configure, link.CallStart: a.start, link.CallQuiesce: a.quiesce, link.CallClock: a.readClock, link.CallPorts: a.tellPorts}, Open: func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case c := <-a.wires:
			return wire{c}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(processpbconnect.NewProcessHandler(a))
	mux.Handle(arcboxv1connect.NewAgentServiceHandler(a))
	mux.HandleFunc("/hello", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host+" "+r.Proto) })
	mux.HandleFunc("/once", a.once)
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: mux, Protocols: &p, ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			a.conns.Add(1)
		}
	}}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() {
		_ = srv.Close()
		_ = l.Close()
		wg.Wait()
	})
	return a
}

// once cuts the link in the first request, and answers the next ones.
func (a *agent) once(w http.ResponseWriter, _ *http.Request) {
	if a.gets.Add(1) == 1 {
		a.cut()
		return
	}
	_, _ = io.WriteString(w, "answer")
}

// dial is a connection's Params.Dial.
func (a *agent) dial(ctx context.Context) (net.Conn, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	host, guest := fileConn(a.t, fds[0]), fileConn(a.t, fds[1])
	select {
	case a.wires <- guest:
		a.links.Add(1)
		a.mu.Lock()
		a.host = host
		a.mu.Unlock()
		return host, nil
	case <-ctx.Done():
		_ = host.Close()
		_ = guest.Close()
		return nil, ctx.Err()
	}
}

func fileConn(t testing.TB, fd int) net.Conn {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Error(err)
	}
	return c
}

// cut breaks the connection that stands.
func (a *agent) cut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.host.Close()
}

func (a *agent) configure(_ context.Context, request []byte, send func([]byte) error) error {
	var m guestv1.ConfigureRequest
	if err := proto.Unmarshal(request, &m); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.configs = append(a.configs, &m)
	warnings := []string{"no\x1b[2J such thing"}
	for range 100 {
		warnings = append(warnings, strings.Repeat("w", 2000))
	}
	b, err := proto.Marshal(&guestv1.ConfigureResponse{AgentVersion: "v9", KernelVersion: "6.1", BootId: "b", Warnings: warnings})
	if err != nil {
		return err
	}
	return send(b)
}

func (a *agent) quiesce(_ context.Context, request []byte, send func([]byte) error) error {
	if err := proto.Unmarshal(request, &guestv1.QuiesceRequest{}); err != nil {
		return err
	}
	b, err := proto.Marshal(&guestv1.QuiesceResponse{FlushNanos: 1e9, FreezeNanos: 2, SyncNanos: 3, Frozen: []string{"hutch", "odd\n"}})
	if err != nil {
		return err
	}
	return send(b)
}

func (a *agent) now() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Now().Add(a.ahead)
}

func (a *agent) readClock(_ context.Context, request []byte, send func([]byte) error) error {
	var m guestv1.ClockRequest
	if err := proto.Unmarshal(request, &m); err != nil {
		return err
	}
	b, err := proto.Marshal(&guestv1.ClockResponse{UnixNanos: a.now().UnixNano()})
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.ahead -= time.Duration(m.GetAheadNanos())
	a.mu.Unlock()
	return send(b)
}

func (a *agent) GetSystemInfo(context.Context, *connect.Request[arcboxv1.Empty]) (*connect.Response[arcboxv1.SystemInfo], error) {
	return connect.NewResponse(&arcboxv1.SystemInfo{TotalMemory: 100, AvailableMemory: 30}), nil
}

func (a *agent) Shutdown(_ context.Context, r *connect.Request[arcboxv1.ShutdownRequest]) (*connect.Response[arcboxv1.ShutdownResponse], error) {
	return connect.NewResponse(&arcboxv1.ShutdownResponse{Accepted: r.Msg.GetTimeoutSeconds() == 2}), nil
}

// reply sends one event.
type reply struct{ to func([]byte) error }

func (r reply) send(ev *processpb.ProcessEvent) error {
	b, err := proto.Marshal(&processpb.StartResponse{Event: ev})
	if err != nil {
		return err
	}
	return r.to(b)
}

func (r reply) start() error {
	return r.send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Start{Start: &processpb.ProcessEvent_StartEvent{Pid: 7}}})
}

func (r reply) stdout(b []byte) error {
	return r.send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: &processpb.ProcessEvent_DataEvent{
		Output: &processpb.ProcessEvent_DataEvent_Stdout{Stdout: b},
	}}})
}

func (r reply) stderr(b []byte) error {
	return r.send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: &processpb.ProcessEvent_DataEvent{
		Output: &processpb.ProcessEvent_DataEvent_Stderr{Stderr: b},
	}}})
}

func (r reply) end(e *processpb.ProcessEvent_EndEvent) error {
	return r.send(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: e}})
}

// start is the call that runs programs; its programs are names of behaviours.
func (a *agent) start(ctx context.Context, request []byte, send func([]byte) error) error {
	var msg processpb.StartRequest
	if err := proto.Unmarshal(request, &msg); err != nil {
		return err
	}
	out, cfg := reply{send}, msg.GetProcess()
	done := &processpb.ProcessEvent_EndEvent{Exited: true}
	var in *input
	if msg.GetStdin() {
		in = &input{closed: make(chan struct{})}
		a.mu.Lock()
		a.inputs[msg.GetTag()] = in
		a.mu.Unlock()
	}
	switch cfg.GetCmd() {
	case "missing":
		return fault.New(fault.NotFound, "no such program")
	case "never":
		<-ctx.Done()
		return ctx.Err()
	}
	if err := out.start(); err != nil {
		return err
	}
	switch cfg.GetCmd() {
	case "tell":
		_ = out.stdout([]byte(strings.Join(cfg.GetArgs(), " ") + " " + cfg.GetUser() + " " + cfg.GetCwd() + " " + cfg.GetEnvs()["E"]))
		_ = out.stderr([]byte("err"))
		done.ExitCode = 3
	case "cat":
		select {
		case <-in.closed:
		case <-ctx.Done():
			return ctx.Err()
		}
		_ = out.stdout(in.buf.Bytes())
	case "flood":
		for range 100 {
			_ = out.stdout(make([]byte, 32<<10))
			_ = out.stderr(make([]byte, 16<<10))
		}
	case "sleep":
		_ = out.stdout([]byte("before"))
		select {
		case <-time.After(time.Duration(msg.GetTimeoutMs()) * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		done = &processpb.ProcessEvent_EndEvent{ExitCode: -1, Signal: "SIGKILL", TimedOut: true}
	case "hang":
		_ = out.stdout([]byte("before"))
		<-ctx.Done()
		return ctx.Err()
	case "vanish":
		return nil
	case "lost":
		done = &processpb.ProcessEvent_EndEvent{Error: new(string)}
	case "huge":
		return out.stdout(make([]byte, 2*maxMessage))
	case "cut":
		a.cut()
		<-ctx.Done()
		return ctx.Err()
	}
	return out.end(done)
}

func (a *agent) input(sel *processpb.ProcessSelector) (*input, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if in := a.inputs[sel.GetTag()]; in != nil {
		return in, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, errors.New("no such process"))
}

func (a *agent) SendInput(_ context.Context, r *connect.Request[processpb.SendInputRequest]) (*connect.Response[processpb.SendInputResponse], error) {
	in, err := a.input(r.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	in.buf.Write(r.Msg.GetInput().GetStdin())
	return connect.NewResponse(&processpb.SendInputResponse{}), nil
}

func (a *agent) CloseStdin(_ context.Context, r *connect.Request[processpb.CloseStdinRequest]) (*connect.Response[processpb.CloseStdinResponse], error) {
	in, err := a.input(r.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	close(in.closed)
	return connect.NewResponse(&processpb.CloseStdinResponse{}), nil
}
