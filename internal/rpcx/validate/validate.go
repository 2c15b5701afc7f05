// Package validate holds requests to the rules that their protos state.
//
// It owns the interceptor that checks every message a handler receives, unary
// or streamed, before the handler sees it, and the words of the answer. It
// never checks answers, and never decides a rule: the rules stand in the
// protos as buf.validate options. It is apart from rpcx because the rule
// engine is large and the guest agent must not link it. Tested by calls to a
// real server.
package validate

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"buf.build/go/protovalidate"
	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxNamed bounds how many broken rules one answer names.
const maxNamed = 5

// interceptor checks what handlers receive.
type interceptor struct{ validator protovalidate.Validator }

// New returns an interceptor that refuses requests which break a rule of
// their proto: as Invalid, the first field at fault in Field, the message
// "field: what it must be". The rules of the given messages are compiled now,
// so that a bad rule fails here; those of others at their first use.
func New(messages ...proto.Message) (connect.Interceptor, error) {
	v, err := protovalidate.New(protovalidate.WithMessages(messages...))
	if err != nil {
		return nil, fmt.Errorf("compile request rules: %w", err)
	}
	return &interceptor{validator: v}, nil
}

// WrapUnary implements connect.Interceptor.
func (i *interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if !req.Spec().IsClient {
			if err := i.check(req.Any()); err != nil {
				return nil, err
			}
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient implements connect.Interceptor; it changes nothing.
func (i *interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (i *interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return next(ctx, &checkedStream{StreamingHandlerConn: conn, check: i.check})
	}
}

// checkedStream checks each message on its way in.
type checkedStream struct {
	connect.StreamingHandlerConn
	check func(any) error
}

// Receive implements connect.StreamingHandlerConn.
func (s *checkedStream) Receive(m any) error {
	if err := s.StreamingHandlerConn.Receive(m); err != nil {
		return err
	}
	return s.check(m)
}

func (i *interceptor) check(m any) error {
	message, ok := m.(proto.Message)
	if !ok {
		return fault.New(fault.Internal, "check request: %T is no protobuf message", m)
	}
	err := i.validator.Validate(message)
	if err == nil {
		return nil
	}
	var broken *protovalidate.ValidationError
	if !errors.As(err, &broken) || len(broken.Violations) == 0 {
		return fault.New(fault.Internal, "check request %s: %w", message.ProtoReflect().Descriptor().Name(), err)
	}
	return explain(broken.Violations)
}

// explain words the broken rules, the first one first.
func explain(violations []*protovalidate.Violation) error {
	var said []string
	for _, v := range violations {
		if len(said) == maxNamed {
			said = append(said, fmt.Sprintf("and %d more", len(violations)-maxNamed))
			break
		}
		said = append(said, v.String())
	}
	return &fault.Error{
		Class: fault.Invalid,
		Field: protovalidate.FieldPathString(violations[0].Proto.GetField()),
		Msg:   strings.Join(said, "; "),
	}
}
