package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// MaxCall bounds the request and the reply of a call, in bytes.
const MaxCall = 1 << 20

// CallConfigure makes the guest a sandbox: hutch.guest.v1.ConfigureRequest to
// ConfigureResponse.
const CallConfigure = "configure"

// CallFunc answers a call. Its error reaches the host with class and words. The
// context ends with the Listener; a host that has gone does not end it.
type CallFunc func(ctx context.Context, request []byte) ([]byte, error)

// The first byte of a reply tells what the rest is.
const (
	replyResult  = 0 // the result
	replyFailure = 1 // name of the error's class, '\n', words
)

// Call makes the call name in the guest and returns its result. It exists for
// what a boot or a restore waits for: unlike a request to the API it costs the
// guest no HTTP and no RPC library, which are dear when they run for the first
// time. A call that the guest answered with an error returns that error, of the
// same class; the guest may have done something whenever an error is returned.
func (s *Session) Call(ctx context.Context, name string, request []byte) ([]byte, error) {
	stream, err := s.m.open(ctx, targetCall+name)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, stream.Reset)
	defer stop()
	result, err := exchange(stream, request)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("call %s in guest: %w", name, err)
	}
	return parseReply(result)
}

func exchange(stream *Stream, request []byte) ([]byte, error) {
	if len(request) > MaxCall {
		return nil, tooLong("request", len(request))
	}
	if _, err := stream.Write(request); err != nil {
		return nil, err
	}
	if err := stream.CloseWrite(); err != nil {
		return nil, err
	}
	return readCall(stream, "reply")
}

// readCall reads one direction of a call to its end.
func readCall(r io.Reader, what string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxCall+2))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxCall+1 { // a reply is a byte longer than what it carries
		return nil, tooLong(what, len(b))
	}
	return b, nil
}

func tooLong(what string, n int) error {
	return fault.New(fault.Exhausted, "%s of %d bytes or more, of which a call takes %d", what, n, MaxCall)
}

func parseReply(b []byte) ([]byte, error) {
	if len(b) > 0 && b[0] == replyResult {
		return b[1:], nil
	}
	if len(b) > 0 && b[0] == replyFailure {
		name, words, _ := strings.Cut(string(b[1:]), "\n")
		return nil, fault.New(className(name), "%s", statusText(words))
	}
	return nil, protocolError("reply to a call of %d bytes", len(b))
}

// className returns the class of that name; Internal when there is none.
func className(name string) fault.Class {
	for _, c := range fault.Classes() {
		if c.String() == name {
			return c
		}
	}
	return fault.Internal
}

// serveCall serves one call of the host on s.
func serveCall(ctx context.Context, s *Stream, call CallFunc) {
	s.accept()
	stop := context.AfterFunc(ctx, s.Reset)
	defer stop()
	defer s.Close()
	request, err := readCall(s, "request")
	if err != nil {
		s.Reset()
		return
	}
	result, err := guardCall(ctx, call, request)
	reply := append([]byte{replyResult}, result...)
	if err != nil {
		reply = fmt.Appendf([]byte{replyFailure}, "%v\n%v", fault.Of(err), err)
	}
	if _, err := s.Write(reply); err != nil {
		s.Reset()
	}
}

// guardCall makes a panic an error of the call: the agent has other callers.
func guardCall(ctx context.Context, call CallFunc, request []byte) (result []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	result, err = call(ctx, request)
	if err == nil && len(result) > MaxCall {
		err = errors.New("the reply is too long")
	}
	return result, err
}
