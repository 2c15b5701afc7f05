package rpcx

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// agent answers two methods as a test says.
type agent struct {
	arcboxv1connect.UnimplementedAgentServiceHandler
	ping func(*arcboxv1.AgentPingRequest) (*arcboxv1.AgentPingResponse, error)
}

func (a agent) Ping(_ context.Context, r *connect.Request[arcboxv1.AgentPingRequest],
) (*connect.Response[arcboxv1.AgentPingResponse], error) {
	answer, err := a.ping(r.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(answer), nil
}

// logBuffer collects what a server logs; safe for concurrent use.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// serve serves mux over HTTP/2 for the time of the test.
func serve(t *testing.T, mux http.Handler) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

func protocols() map[string][]connect.ClientOption {
	return map[string][]connect.ClientOption{
		"connect":  nil,
		"json":     {connect.WithProtoJSON()},
		"grpc":     {connect.WithGRPC()},
		"grpc-web": {connect.WithGRPCWeb()},
	}
}

func TestUnaryCalls(t *testing.T) {
	testenv.CheckGoroutines(t)
	logs := &logBuffer{}
	mux := http.NewServeMux()
	mux.Handle(arcboxv1connect.NewAgentServiceHandler(agent{ping: func(r *arcboxv1.AgentPingRequest,
	) (*arcboxv1.AgentPingResponse, error) {
		switch r.GetMessage() {
		case "missing":
			return nil, fault.New(fault.NotFound, "no sandbox %q", "sb-1")
		case "broken":
			return nil, errors.New("write /x: disk on fire")
		case "panic":
			panic("lost my mind")
		}
		return &arcboxv1.AgentPingResponse{Message: "pong"}, nil
	}}, HandlerOptions(logs.logger())...))
	srv := serve(t, mux)
	for name, options := range protocols() {
		t.Run(name, func(t *testing.T) {
			c := arcboxv1connect.NewAgentServiceClient(srv.Client(), srv.URL, append(ClientOptions(), options...)...)
			for _, tc := range []struct {
				message, want string
				class         fault.Class
			}{
				{"missing", `no sandbox "sb-1"`, fault.NotFound},
				{"broken", "write /x: disk on fire", fault.Internal},
				{"panic", "panic in /arcbox.v1.AgentService/Ping: lost my mind", fault.Internal},
			} {
				_, err := c.Ping(testenv.Context(t), connect.NewRequest(&arcboxv1.AgentPingRequest{Message: tc.message}))
				if !fault.Is(err, tc.class) || err.Error() != tc.want {
					t.Errorf("%s: error = %v (%v), want %v (%v)", tc.message, err, fault.Of(err), tc.want, tc.class)
				}
			}
			res, err := c.Ping(testenv.Context(t), connect.NewRequest(&arcboxv1.AgentPingRequest{}))
			if err != nil || res.Msg.GetMessage() != "pong" {
				t.Errorf("after all that, ping = %v, %v", res, err)
			}
		})
	}
	got := logs.String()
	for line, want := range map[string]int{
		`level=DEBUG msg="rpc failed" method=/arcbox.v1.AgentService/Ping code=not_found`: len(protocols()),
		`level=WARN msg="rpc failed" method=/arcbox.v1.AgentService/Ping code=internal`:   2 * len(protocols()),
		`level=ERROR msg="rpc panicked"`:                                                  len(protocols()),
		"rpcx.TestUnaryCalls.func":                                                        len(protocols()), // the stack leads to who panicked
	} {
		if n := strings.Count(got, line); n < want || (n != want && !strings.Contains(line, "TestUnary")) {
			t.Errorf("%d lines with %q, want %d, in:\n%s", n, line, want, got)
		}
	}
}

func TestAbortedHandlersStayAborted(t *testing.T) {
	logs := &logBuffer{}
	mux := http.NewServeMux()
	mux.Handle(arcboxv1connect.NewAgentServiceHandler(agent{ping: func(*arcboxv1.AgentPingRequest,
	) (*arcboxv1.AgentPingResponse, error) {
		panic(http.ErrAbortHandler)
	}}, HandlerOptions(logs.logger())...))
	srv := serve(t, mux)
	c := arcboxv1connect.NewAgentServiceClient(srv.Client(), srv.URL, ClientOptions()...)
	if _, err := c.Ping(testenv.Context(t), connect.NewRequest(&arcboxv1.AgentPingRequest{})); err == nil {
		t.Error("an aborted call succeeded")
	}
	if strings.Contains(logs.String(), "panicked") {
		t.Errorf("an abort was logged as a panic: %s", logs)
	}
}

func TestMessageLimit(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle(arcboxv1connect.NewAgentServiceHandler(agent{ping: func(r *arcboxv1.AgentPingRequest,
	) (*arcboxv1.AgentPingResponse, error) {
		if r.GetMessage() == "large" {
			return &arcboxv1.AgentPingResponse{Message: strings.Repeat("x", MaxMessage)}, nil
		}
		return &arcboxv1.AgentPingResponse{}, nil
	}}, HandlerOptions(slog.New(slog.DiscardHandler))...))
	srv := serve(t, mux)
	c := arcboxv1connect.NewAgentServiceClient(srv.Client(), srv.URL, ClientOptions()...)
	// Only the server refuses here: this client may send anything.
	free := arcboxv1connect.NewAgentServiceClient(srv.Client(), srv.URL)
	large := &arcboxv1.AgentPingRequest{Message: strings.Repeat("x", MaxMessage)}
	if _, err := c.Ping(testenv.Context(t), connect.NewRequest(large)); !fault.Is(err, fault.Exhausted) {
		t.Errorf("our client sent too much: %v", err)
	}
	if _, err := free.Ping(testenv.Context(t), connect.NewRequest(large)); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("the server took too much: %v", err)
	}
	small := &arcboxv1.AgentPingRequest{Message: "large"}
	if _, err := c.Ping(testenv.Context(t), connect.NewRequest(small)); !fault.Is(err, fault.Exhausted) {
		t.Errorf("the server answered too much: %v", err)
	}
}

// TestStreams speaks over a bidirectional stream that fails in the middle.
func TestStreams(t *testing.T) {
	const path = "/test.Echo/Both"
	logs := &logBuffer{}
	mux := http.NewServeMux()
	mux.Handle(path, connect.NewBidiStreamHandler(path, func(_ context.Context,
		s *connect.BidiStream[arcboxv1.AgentPingRequest, arcboxv1.AgentPingResponse]) error {
		for {
			m, err := s.Receive()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			switch m.GetMessage() {
			case "fail":
				return fault.New(fault.Precondition, "sandbox is paused")
			case "panic":
				panic("in a stream")
			}
			if err := s.Send(&arcboxv1.AgentPingResponse{Message: m.GetMessage()}); err != nil {
				return err
			}
		}
	}, HandlerOptions(logs.logger())...))
	srv := serve(t, mux)
	for _, tc := range []struct {
		last  string
		class fault.Class
		want  string
	}{
		{"fail", fault.Precondition, "sandbox is paused"},
		{"panic", fault.Internal, "panic in " + path + ": in a stream"},
		{"", 0, ""},
	} {
		c := connect.NewClient[arcboxv1.AgentPingRequest, arcboxv1.AgentPingResponse](srv.Client(), srv.URL+path, ClientOptions()...)
		s := c.CallBidiStream(testenv.Context(t))
		if err := s.Send(&arcboxv1.AgentPingRequest{Message: "one"}); err != nil {
			t.Fatalf("send: %v", err)
		}
		if m, err := s.Receive(); err != nil || m.GetMessage() != "one" {
			t.Fatalf("receive = %v, %v", m, err)
		}
		if tc.last != "" {
			if err := s.Send(&arcboxv1.AgentPingRequest{Message: tc.last}); err != nil {
				t.Fatalf("send: %v", err)
			}
		}
		if err := s.CloseRequest(); err != nil {
			t.Errorf("close request: %v", err)
		}
		_, err := s.Receive()
		if tc.last == "" {
			if !errors.Is(err, io.EOF) {
				t.Errorf("end of stream = %v, want EOF", err)
			}
		} else if !fault.Is(err, tc.class) || err.Error() != tc.want {
			t.Errorf("%s: error = %v (%v), want %v", tc.last, err, fault.Of(err), tc.want)
		}
		if err := s.CloseResponse(); err != nil {
			t.Errorf("close response: %v", err)
		}
	}
	if !strings.Contains(logs.String(), `level=ERROR msg="rpc panicked" method=`+path) {
		t.Errorf("no line about the panic in:\n%s", logs)
	}
}
