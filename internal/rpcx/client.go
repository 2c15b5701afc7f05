package rpcx

import (
	"context"

	"connectrpc.com/connect"
)

// client gives callers faults instead of errors of connect.
type client struct{}

// NewClientInterceptor returns the interceptor of every client: errors of
// calls come back as FromConnect makes them. The end of a stream stays io.EOF.
func NewClientInterceptor() connect.Interceptor { return client{} }

// WrapUnary implements connect.Interceptor.
func (client) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if req.Spec().IsClient {
			err = FromConnect(err)
		}
		return res, err
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (client) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		return &clientStream{next(ctx, spec)}
	}
}

// WrapStreamingHandler implements connect.Interceptor; it changes nothing.
func (client) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// clientStream maps the errors of one stream.
type clientStream struct{ connect.StreamingClientConn }

func (s *clientStream) Send(m any) error    { return FromConnect(s.StreamingClientConn.Send(m)) }
func (s *clientStream) Receive(m any) error { return FromConnect(s.StreamingClientConn.Receive(m)) }
func (s *clientStream) CloseRequest() error { return FromConnect(s.StreamingClientConn.CloseRequest()) }
func (s *clientStream) CloseResponse() error {
	return FromConnect(s.StreamingClientConn.CloseResponse())
}
