package rpcx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"

	"github.com/hutch-run/hutch/internal/fault"
)

// server maps, logs and recovers, around every call of a handler.
type server struct{ log *slog.Logger }

// NewServerInterceptor returns the interceptor of every handler. It gives
// errors the form of ToConnect, writes one line for each call that failed
// (warn when the error is internal, debug when it is the caller's), and turns
// a panic into an internal error, its stack into the log. It must be the
// outermost one; HandlerOptions puts it there. http.ErrAbortHandler passes.
func NewServerInterceptor(log *slog.Logger) connect.Interceptor { return &server{log: log} }

// WrapUnary implements connect.Interceptor.
func (s *server) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (_ connect.AnyResponse, err error) {
		if req.Spec().IsClient {
			return next(ctx, req)
		}
		start := time.Now()
		defer func() { err = s.end(ctx, req.Spec().Procedure, start, recover(), err) }()
		return next(ctx, req)
	}
}

// WrapStreamingClient implements connect.Interceptor; it changes nothing.
func (s *server) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (s *server) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) (err error) {
		start := time.Now()
		defer func() { err = s.end(ctx, conn.Spec().Procedure, start, recover(), err) }()
		return next(ctx, conn)
	}
}

// end closes the account of one call: panicked is what recover returned.
func (s *server) end(ctx context.Context, procedure string, start time.Time, panicked any, err error) error {
	if panicked != nil {
		if abort, ok := panicked.(error); ok && errors.Is(abort, http.ErrAbortHandler) {
			panic(panicked)
		}
		s.log.ErrorContext(ctx, "rpc panicked", "method", procedure,
			"panic", fmt.Sprint(panicked), "stack", string(debug.Stack()))
		err = fault.New(fault.Internal, "panic in %s: %v", procedure, panicked)
	}
	if err == nil {
		return nil
	}
	level := slog.LevelDebug
	if classOf(err) == fault.Internal {
		level = slog.LevelWarn
	}
	shown := ToConnect(err)
	s.log.Log(ctx, level, "rpc failed", "method", procedure,
		"code", connect.CodeOf(shown).String(), "duration", time.Since(start), "err", err)
	return shown
}
