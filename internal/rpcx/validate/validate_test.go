package validate

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/testenv"
)

type (
	request  = hostagentv1.CreateSandboxRequest
	response = hostagentv1.CreateSandboxResponse
)

func options(t *testing.T) []connect.HandlerOption {
	t.Helper()
	v, err := New(&request{})
	if err != nil {
		t.Fatal(err)
	}
	return rpcx.HandlerOptions(slog.New(slog.DiscardHandler), v)
}

func serve(t *testing.T, path string, h http.Handler) *connect.Client[request, response] {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(path, h)
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return connect.NewClient[request, response](srv.Client(), srv.URL+path, rpcx.ClientOptions()...)
}

func TestUnaryRequests(t *testing.T) {
	const path = "/test.Create/Unary"
	calls := 0
	c := serve(t, path, connect.NewUnaryHandler(path, func(context.Context, *connect.Request[request],
	) (*connect.Response[response], error) {
		calls++
		return connect.NewResponse(&response{SandboxId: "not even valid!"}), nil
	}, options(t)...))
	many := map[string]string{}
	for _, k := range []string{"a b", "c d", "e f", "g h", "i j", "k l", "m n"} {
		many[k] = ""
	}
	for _, tc := range []struct {
		name, field string
		says        []string
		req         *request
	}{
		{"too many", "vcpus", []string{"vcpus: "}, &request{Vcpus: 65}},
		{"own words", "memory_mb", []string{"memory_mb: must be 0 (default) or between 96"}, &request{MemoryMb: 95}},
		{"pattern", "sandbox_id", []string{"sandbox_id: "}, &request{SandboxId: "../etc"}},
		{"two at once", "vcpus", []string{"vcpus: ", "; memory_mb: "}, &request{Vcpus: -1, MemoryMb: -1}},
		{"many", "", []string{"default_env[", "and 2 more"}, &request{DefaultEnv: many}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := calls
			_, err := c.CallUnary(testenv.Context(t), connect.NewRequest(tc.req))
			var fe *fault.Error
			if !errors.As(err, &fe) || fe.Class != fault.Invalid {
				t.Fatalf("error = %v, want an invalid one", err)
			}
			if tc.field != "" && fe.Field != tc.field {
				t.Errorf("field = %q, want %q", fe.Field, tc.field)
			}
			for _, says := range tc.says {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("%q does not say %q", err, says)
				}
			}
			if calls != before {
				t.Error("the handler saw the bad request")
			}
		})
	}
	if _, err := c.CallUnary(testenv.Context(t), connect.NewRequest(&request{Vcpus: 2})); err != nil || calls != 1 {
		t.Errorf("a good request: %v, handler called %d times", err, calls)
	}
}

func TestEveryMessageOfAStreamIsChecked(t *testing.T) {
	const path = "/test.Create/Many"
	seen := 0
	c := serve(t, path, connect.NewBidiStreamHandler(path, func(_ context.Context, s *connect.BidiStream[request, response]) error {
		for {
			if _, err := s.Receive(); err != nil {
				return err
			}
			seen++
			if err := s.Send(&response{}); err != nil {
				return err
			}
		}
	}, options(t)...))
	s := c.CallBidiStream(testenv.Context(t))
	for _, r := range []*request{{Vcpus: 1}, {Vcpus: 2}} {
		if err := s.Send(r); err != nil {
			t.Fatalf("send: %v", err)
		}
		if _, err := s.Receive(); err != nil {
			t.Fatalf("receive: %v", err)
		}
	}
	if err := s.Send(&request{Vcpus: 1000}); err != nil {
		t.Fatalf("send: %v", err)
	}
	if _, err := s.Receive(); !fault.Is(err, fault.Invalid) || !strings.HasPrefix(err.Error(), "vcpus: ") {
		t.Errorf("error = %v, want vcpus named", err)
	}
	_ = s.CloseRequest()
	_ = s.CloseResponse()
	if seen != 2 {
		t.Errorf("the handler saw %d messages, want 2", seen)
	}
}

func TestServerStreamRequests(t *testing.T) {
	const path = "/test.Create/Watch"
	c := serve(t, path, connect.NewServerStreamHandler(path, func(context.Context, *connect.Request[request],
		*connect.ServerStream[response]) error {
		t.Error("the handler saw the bad request")
		return nil
	}, options(t)...))
	s, err := c.CallServerStream(testenv.Context(t), connect.NewRequest(&request{Vcpus: 99}))
	if err == nil {
		for s.Receive() {
			t.Error("got an answer")
		}
		err = s.Err()
		_ = s.Close()
	}
	if !fault.Is(err, fault.Invalid) {
		t.Errorf("error = %v, want an invalid one", err)
	}
}
