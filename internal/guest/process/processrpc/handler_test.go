package processrpc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	processpb "github.com/hutch-run/hutch/gen/process"
	"github.com/hutch-run/hutch/gen/process/processpbconnect"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/process"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/testenv"
)

type rig struct {
	table  *process.Table
	h      *Handler
	url    string
	http   *http.Client
	client processpbconnect.ProcessClient
}

func newRig(t *testing.T, opts ...connect.ClientOption) *rig {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	log := slog.New(slog.DiscardHandler)
	table, err := process.New(process.Params{Log: log, Accounts: account.NewFiles("/"), Defaults: account.Fixed{}})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{table: table, h: New(table)}
	mux := http.NewServeMux()
	mux.Handle(r.h.Mount(rpcx.HandlerOptions(log)...))
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := table.Close(ctx); err != nil {
			t.Error(err)
		}
		srv.CloseClientConnections()
		srv.Close()
	})
	r.url, r.http = srv.URL, srv.Client()
	r.client = processpbconnect.NewProcessClient(r.http, r.url, opts...)
	return r
}

func sh(script string) *processpb.StartRequest {
	no := false
	return &processpb.StartRequest{
		Process: &processpb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}, Stdin: &no,
	}
}

// seen is what a stream delivered.
type seen struct {
	kinds         []string
	pid           uint32
	out, err, pty bytes.Buffer
	end           *processpb.ProcessEvent_EndEvent
}

func (s *seen) add(ev *processpb.ProcessEvent) {
	kind := ""
	switch e := ev.GetEvent().(type) {
	case *processpb.ProcessEvent_Start:
		kind, s.pid = "start", e.Start.GetPid()
	case *processpb.ProcessEvent_Data:
		kind = "data"
		s.out.Write(e.Data.GetStdout())
		s.err.Write(e.Data.GetStderr())
		s.pty.Write(e.Data.GetPty())
	case *processpb.ProcessEvent_End:
		kind, s.end = "end", e.End
	case *processpb.ProcessEvent_Keepalive:
		kind = "keepalive"
	}
	if n := len(s.kinds); n == 0 || s.kinds[n-1] != kind {
		s.kinds = append(s.kinds, kind)
	}
}

func run(t *testing.T, c processpbconnect.ProcessClient, req *connect.Request[processpb.StartRequest]) *seen {
	t.Helper()
	stream, err := c.Start(testenv.Context(t), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	s := &seen{}
	for stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	if err := stream.Err(); err != nil {
		t.Fatalf("stream: %v", err)
	}
	return s
}

func TestStartInEveryProtocol(t *testing.T) {
	for name, opts := range map[string][]connect.ClientOption{
		"connect": nil, "grpc": {connect.WithGRPC()}, "grpc-web": {connect.WithGRPCWeb()}, "json": {connect.WithProtoJSON()},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, opts...)
			s := run(t, r.client, connect.NewRequest(sh("echo out; echo err >&2; exit 4")))
			if d := cmp.Diff([]string{"start", "data", "end"}, s.kinds); d != "" {
				t.Error(d)
			}
			if s.pid == 0 || s.out.String() != "out\n" || s.err.String() != "err\n" {
				t.Errorf("pid %d, %q, %q", s.pid, s.out.String(), s.err.String())
			}
			if e := s.end; e.GetExitCode() != 4 || !e.GetExited() || e.GetStatus() != "exit status 4" || e.GetError() != "exit status 4" {
				t.Errorf("end %v", e)
			}
		})
	}
}

func TestSuccessHasNoError(t *testing.T) {
	r := newRig(t)
	s := run(t, r.client, connect.NewRequest(sh("true")))
	if s.end.Error != nil || s.end.GetStatus() != "exit status 0" || !s.end.GetExited() {
		t.Errorf("end %v", s.end)
	}
}

// The deadline of the request kills the program, and what it said until then
// and its End still come. The headers are set by hand: a client with a real
// deadline would give up on a machine that is slow enough.
func TestRequestDeadlineIsTheProgramsLimit(t *testing.T) {
	for name, tc := range map[string]struct {
		opts          []connect.ClientOption
		header, value string
	}{
		"connect":  {nil, connectTimeout, "2000"},
		"grpc":     {[]connect.ClientOption{connect.WithGRPC()}, grpcTimeout, "2S"},
		"grpc-web": {[]connect.ClientOption{connect.WithGRPCWeb()}, grpcTimeout, "2000m"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, tc.opts...)
			ctx, cancel := context.WithCancel(context.WithoutCancel(testenv.Context(t)))
			defer cancel()
			req := connect.NewRequest(sh("echo partial; sleep 1000"))
			req.Header().Set(tc.header, tc.value)
			stream, err := r.client.Start(ctx, req)
			if err != nil {
				t.Fatal(err)
			}
			defer stream.Close()
			s := &seen{}
			for stream.Receive() {
				s.add(stream.Msg().GetEvent())
			}
			if stream.Err() != nil || s.out.String() != "partial\n" || !s.end.GetTimedOut() || s.end.GetExited() || s.end.GetStatus() != "timed out" {
				t.Errorf("%q, %v, %v", s.out.String(), s.end, stream.Err())
			}
		})
	}
}

func TestWhatIsLeftOfTheDeadline(t *testing.T) {
	for value, want := range map[string]bool{"0": false, "60000": true} {
		var left time.Duration
		inner := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			left = limitFrom(r.Context())
			if r.Header.Get(connectTimeout) != "" {
				t.Error("connect would still see the header")
			}
		})
		req := httptest.NewRequest(http.MethodPost, processpbconnect.ProcessStartProcedure, nil)
		req.Header.Set(connectTimeout, value)
		liftDeadline(inner).ServeHTTP(httptest.NewRecorder(), req)
		if want != (left > 0 && left <= 59500*time.Millisecond) || (!want && left != 0) {
			t.Errorf("%s ms: %v left", value, left)
		}
	}
	if got := early(time.Second); got != 900*time.Millisecond {
		t.Errorf("a second becomes %v", got)
	}
}

func TestOwnLimitWinsOverTheDeadline(t *testing.T) {
	r := newRig(t)
	req := sh("echo x; sleep 1000")
	req.TimeoutMs = 100
	s := run(t, r.client, connect.NewRequest(req))
	if e := s.end; !e.GetTimedOut() || !strings.Contains(e.GetError(), "timed out after 100ms") || e.GetSignal() != "SIGKILL" || e.GetExitCode() != 137 {
		t.Errorf("end %v", e)
	}
}

func TestDeadlineHeaders(t *testing.T) {
	for _, tc := range []struct {
		header, value string
		want          time.Duration
		ok            bool
	}{
		{connectTimeout, "1500", 1500 * time.Millisecond, true}, {connectTimeout, "0", 0, true},
		{connectTimeout, "9999999999", 9999999999 * time.Millisecond, true}, {connectTimeout, "99999999999", 0, false},
		{connectTimeout, "-1", 0, false}, {connectTimeout, "1s", 0, false},
		{grpcTimeout, "2S", 2 * time.Second, true}, {grpcTimeout, "20u", 20 * time.Microsecond, true},
		{grpcTimeout, "99999999H", 100 * 365 * 24 * time.Hour, true}, {grpcTimeout, "S", 0, false}, {grpcTimeout, "5x", 0, false},
		{grpcTimeout, "123456789m", 0, false},
	} {
		h := http.Header{}
		h.Set(tc.header, tc.value)
		if got, ok := requestDeadline(h); got != tc.want || ok != tc.ok {
			t.Errorf("%s %q: %v %v", tc.header, tc.value, got, ok)
		}
	}
}

func TestClientThatLeavesEndsNothing(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	defer cancel()
	req := sh("echo ready; read x; echo $x; exit 6")
	tag, yes := "job", true
	req.Tag, req.Stdin = &tag, &yes
	stream, err := r.client.Start(ctx, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	var pid uint32
	for stream.Receive() {
		if s := stream.Msg().GetEvent().GetStart(); s != nil {
			pid = s.GetPid()
		}
		if stream.Msg().GetEvent().GetData() != nil {
			break
		}
	}
	cancel()
	_ = stream.Close()
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: tag}}
	list, err := r.client.List(testenv.Context(t), connect.NewRequest(&processpb.ListRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if ps := list.Msg.GetProcesses(); len(ps) != 1 || ps[0].GetPid() != pid || ps[0].GetTag() != tag || ps[0].GetEnded() ||
		ps[0].GetUser() != "root" || ps[0].GetConfig().GetCmd() != "/bin/sh" {
		t.Errorf("list: %v", ps)
	}
	again, err := r.client.Connect(testenv.Context(t), connect.NewRequest(&processpb.ConnectRequest{Process: sel}))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	input := &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: []byte("there\n")}}
	if _, err := r.client.SendInput(testenv.Context(t), connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: input})); err != nil {
		t.Fatal(err)
	}
	s := &seen{}
	for again.Receive() {
		s.add(again.Msg().GetEvent())
	}
	if s.pid != pid || s.out.String() != "ready\nthere\n" || s.end.GetExitCode() != 6 {
		t.Errorf("%d %q %v %v", s.pid, s.out.String(), s.end, again.Err())
	}
}

func TestStreamInput(t *testing.T) {
	r := newRig(t)
	tag := "sink"
	req := sh("sha256sum")
	req.Tag, req.Stdin = &tag, nil
	stream, err := r.client.Start(testenv.Context(t), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: tag}}
	in := r.client.StreamInput(testenv.Context(t))
	send := func(m *processpb.StreamInputRequest) {
		t.Helper()
		if err := in.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	send(&processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Start{Start: &processpb.StreamInputRequest_StartEvent{Process: sel}}})
	sum := sha256.New()
	for i := range 300 {
		data := bytes.Repeat([]byte{byte(i)}, 10_000+i)
		sum.Write(data)
		send(&processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Data{Data: &processpb.StreamInputRequest_DataEvent{
			Input: &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: data}}}}})
		send(&processpb.StreamInputRequest{Event: &processpb.StreamInputRequest_Keepalive{Keepalive: &processpb.StreamInputRequest_KeepAlive{}}})
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.CloseStdin(testenv.Context(t), connect.NewRequest(&processpb.CloseStdinRequest{Process: sel})); err != nil {
		t.Fatal(err)
	}
	s := &seen{}
	for stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	if want := fmt.Sprintf("%x  -\n", sum.Sum(nil)); s.out.String() != want {
		t.Errorf("got %q, want %q", s.out.String(), want)
	}
}

func TestTerminalOverTheWire(t *testing.T) {
	r := newRig(t)
	req := sh("stty size; read x; stty size")
	tag := "tty"
	req.Tag = &tag
	req.Pty = &processpb.PTY{Size: &processpb.PTY_Size{Cols: 90, Rows: 20}}
	stream, err := r.client.Start(testenv.Context(t), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	s := &seen{}
	for !strings.Contains(s.pty.String(), "20 90") && stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: tag}}
	size := &processpb.PTY{Size: &processpb.PTY_Size{Cols: 91, Rows: 21}}
	if _, err := r.client.Update(testenv.Context(t), connect.NewRequest(&processpb.UpdateRequest{Process: sel, Pty: size})); err != nil {
		t.Fatal(err)
	}
	input := &processpb.ProcessInput{Input: &processpb.ProcessInput_Pty{Pty: []byte("\n")}}
	if _, err := r.client.SendInput(testenv.Context(t), connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: input})); err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	if !strings.Contains(s.pty.String(), "21 91") || s.end.GetExitCode() != 0 {
		t.Errorf("%q %v %v", s.pty.String(), s.end, stream.Err())
	}
}

func TestKeepalive(t *testing.T) {
	r := newRig(t)
	r.h.keepalive = 5 * time.Millisecond
	req := sh("read x")
	req.Stdin = nil
	stream, err := r.client.Start(testenv.Context(t), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	s := &seen{}
	for len(s.kinds) < 2 && stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	if d := cmp.Diff([]string{"start", "keepalive"}, s.kinds); d != "" {
		t.Error(d)
	}
	for value, want := range map[string]time.Duration{
		"": time.Minute, "x": time.Minute, "-4": time.Minute, "7": 7 * time.Second, "99999999999": time.Hour,
	} {
		if got := interval(http.Header{keepaliveHeader: {value}}, time.Minute); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
}

func TestErrors(t *testing.T) {
	r := newRig(t)
	ctx := testenv.Context(t)
	byPid := func(pid uint32) *processpb.ProcessSelector {
		return &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: pid}}
	}
	start := func(change func(*connect.Request[processpb.StartRequest])) error {
		req := connect.NewRequest(sh("true"))
		change(req)
		stream, err := r.client.Start(ctx, req)
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
		}
		return stream.Err()
	}
	type startReq = connect.Request[processpb.StartRequest]
	for name, tc := range map[string]struct {
		err   error
		code  connect.Code
		words string
	}{
		"no process": {start(func(r *startReq) { r.Msg.Process = nil }), connect.CodeInvalidArgument, "process.cmd"},
		"no program": {start(func(r *startReq) { r.Msg.Process.Cmd = "nosuchthing" }), connect.CodeNotFound, "nosuchthing"},
		"no user": {start(func(r *startReq) {
			r.Header().Set("Authorization", "Basic bm9zdWNodXNlcjo=")
		}), connect.CodeUnauthenticated, "nosuchuser"},
		"huge terminal": {start(func(r *startReq) {
			r.Msg.Pty = &processpb.PTY{Size: &processpb.PTY_Size{Cols: 70000}}
		}), connect.CodeInvalidArgument, "pty.size"},
		"long tag": {start(func(r *startReq) {
			tag := strings.Repeat("x", 300)
			r.Msg.Tag = &tag
		}), connect.CodeInvalidArgument, "tag"},
		"unknown pid": {second(r.client.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: byPid(1 << 30)}))),
			connect.CodeNotFound, "no program with pid"},
		"no selector": {second(r.client.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{}))),
			connect.CodeInvalidArgument, "by pid or tag"},
		"no signal": {second(r.client.SendSignal(ctx, connect.NewRequest(&processpb.SendSignalRequest{Process: byPid(1)}))),
			connect.CodeInvalidArgument, "signal"},
		"odd signal": {second(r.client.SendSignal(ctx, connect.NewRequest(&processpb.SendSignalRequest{Process: byPid(1), Signal: 63}))),
			connect.CodeInvalidArgument, "signal"},
		"input of nothing": {second(r.client.StreamInput(ctx).CloseAndReceive()), connect.CodeInvalidArgument, "start"},
	} {
		if connect.CodeOf(tc.err) != tc.code || tc.err == nil || !strings.Contains(tc.err.Error(), tc.words) {
			t.Errorf("%s: %v, want %v with %q", name, tc.err, tc.code, tc.words)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestSignals(t *testing.T) {
	r := newRig(t)
	stream, err := r.client.Start(testenv.Context(t), connect.NewRequest(sh("trap 'exit 12' USR1; echo ready; while :; do sleep 0.01; done")))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	s := &seen{}
	for !strings.Contains(s.out.String(), "ready") && stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	sel := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: s.pid}}
	if _, err := r.client.SendSignal(testenv.Context(t), connect.NewRequest(&processpb.SendSignalRequest{Process: sel, Signal: processpb.Signal_SIGNAL_SIGUSR1})); err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
		s.add(stream.Msg().GetEvent())
	}
	if s.end.GetExitCode() != 12 {
		t.Errorf("end %v, %v", s.end, stream.Err())
	}
}
