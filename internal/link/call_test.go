package link

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// listenCalls starts a guest on v that answers calls.
func listenCalls(t *testing.T, v *vport, calls map[string]CallFunc) {
	t.Helper()
	l, err := Listen(ListenParams{Open: v.open, Calls: calls})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
}

func TestCall(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	listenCalls(t, v, map[string]CallFunc{
		"upper": func(_ context.Context, b []byte) ([]byte, error) { return bytes.ToUpper(b), nil },
		"fail": func(context.Context, []byte) ([]byte, error) {
			return nil, fault.New(fault.Precondition, "not\x1b[2J now")
		},
		"panic": func(context.Context, []byte) ([]byte, error) { panic("oops") },
		"long":  func(context.Context, []byte) ([]byte, error) { return make([]byte, MaxCall+1), nil },
	})
	s := dial(t, ctx, v)
	for _, n := range []int{0, 1, 300, MaxCall} {
		got, err := s.Call(ctx, "upper", bytes.Repeat([]byte("a"), n))
		if err != nil || !bytes.Equal(got, bytes.Repeat([]byte("A"), n)) {
			t.Errorf("call with %d bytes: %d bytes, %v", n, len(got), err)
		}
	}
	for _, tc := range []struct {
		name  string
		size  int
		class fault.Class
		words string
	}{
		{"fail", 0, fault.Precondition, "not.[2J now"},
		{"panic", 0, fault.Internal, "panic: oops"},
		{"long", 0, fault.Internal, "the reply is too long"},
		{"upper", MaxCall + 1, fault.Exhausted, "call upper in guest: request of 1048577 bytes or more, of which a call takes 1048576"},
	} {
		if _, err := s.Call(ctx, tc.name, make([]byte, tc.size)); fault.Of(err) != tc.class || err.Error() != tc.words {
			t.Errorf("%s: class %v, error %v", tc.name, fault.Of(err), err)
		}
	}
	var status *StatusError
	if _, err := s.Call(ctx, "nothing", nil); !errors.As(err, &status) || status.Status != StatusDenied {
		t.Errorf("unknown call: %v", err)
	}
	waitStreams(t, s.m, 0)
}

func TestCallEndsWithItsContext(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	begun := make(chan struct{})
	listenCalls(t, v, map[string]CallFunc{"hang": func(ctx context.Context, _ []byte) ([]byte, error) {
		close(begun)
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	s := dial(t, ctx, v)
	short, cancel := context.WithCancel(ctx)
	go func() {
		<-begun
		cancel()
	}()
	if _, err := s.Call(short, "hang", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	waitStreams(t, s.m, 0)
}

func TestCallEndsWithItsSession(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	begun := make(chan struct{})
	listenCalls(t, v, map[string]CallFunc{"hang": func(ctx context.Context, _ []byte) ([]byte, error) {
		close(begun)
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	s := dial(t, ctx, v)
	go func() {
		<-begun
		_ = s.Close()
	}()
	if _, err := s.Call(ctx, "hang", nil); !errors.Is(err, ErrEnded) {
		t.Errorf("error = %v", err)
	}
}

// TestReplyOfAHostileGuest parses what no agent of ours says.
func TestReplyOfAHostileGuest(t *testing.T) {
	for _, b := range [][]byte{nil, {7}, {7, 'x'}} {
		if _, err := parseReply(b); !errors.Is(err, ErrProtocol) {
			t.Errorf("reply %v: %v", b, err)
		}
	}
	if _, err := parseReply([]byte("\x01nonsense")); fault.Of(err) != fault.Internal {
		t.Errorf("class %v, %v", fault.Of(err), err)
	}
	long := append([]byte("\x01canceled\n"), bytes.Repeat([]byte("w"), 100_000)...)
	if _, err := parseReply(long); fault.Of(err) != fault.Canceled || len(err.Error()) > maxStatusText {
		t.Errorf("class %v, %d bytes", fault.Of(err), len(err.Error()))
	}
}
