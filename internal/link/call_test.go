package link

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
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
		"upper": func(_ context.Context, b []byte, send func([]byte) error) error { return send(bytes.ToUpper(b)) },
		"fail": func(context.Context, []byte, func([]byte) error) error {
			return fault.New(fault.Precondition, "not\x1b[2J now")
		},
		"panic":  func(context.Context, []byte, func([]byte) error) error { panic("oops") },
		"long":   func(_ context.Context, _ []byte, send func([]byte) error) error { return send(make([]byte, MaxCall+1)) },
		"silent": func(context.Context, []byte, func([]byte) error) error { return nil },
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
		{"long", 0, fault.Exhausted, "reply of 1048577 bytes, of which a call takes 1048576"},
		{"upper", MaxCall + 1, fault.Exhausted, "request of 1048577 bytes, of which a call takes 1048576"},
		{"silent", 0, fault.Internal, "link protocol violated: 0 replies to call silent"},
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
	begun, given := make(chan struct{}), make(chan struct{})
	listenCalls(t, v, map[string]CallFunc{"hang": func(ctx context.Context, _ []byte, _ func([]byte) error) error {
		close(begun)
		<-ctx.Done()
		close(given)
		return ctx.Err()
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
	<-given // the guest is told
	waitStreams(t, s.m, 0)
}

func TestCallEndsWithItsSession(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	begun := make(chan struct{})
	listenCalls(t, v, map[string]CallFunc{"hang": func(ctx context.Context, _ []byte, _ func([]byte) error) error {
		close(begun)
		<-ctx.Done()
		return ctx.Err()
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

// TestCallStreams sends more than all buffers hold, to a host that reads slowly
// at first, and one that stops reading.
func TestCallStreams(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, v := testenv.Context(t), newVport(t)
	const replies, size = 100, 40_000
	ended := make(chan error, 2)
	listenCalls(t, v, map[string]CallFunc{"count": func(_ context.Context, _ []byte, send func([]byte) error) (err error) {
		defer func() { ended <- err }()
		for n := range replies {
			if err := send(bytes.Repeat([]byte{byte(n)}, size)); err != nil {
				return err
			}
		}
		return nil
	}})
	s := dial(t, ctx, v)
	got := 0
	err := s.Stream(ctx, "count", nil, func(b []byte) error {
		if !bytes.Equal(b, bytes.Repeat([]byte{byte(got)}, size)) {
			t.Errorf("reply %d is another", got)
		}
		got++
		return nil
	})
	if err != nil || got != replies || <-ended != nil {
		t.Errorf("%d replies, %v", got, err)
	}
	enough := errors.New("enough")
	if err := s.Stream(ctx, "count", nil, func([]byte) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("error = %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the guest sent on to a host that had stopped")
	}
	waitStreams(t, s.m, 0)
}

// TestRepliesOfAHostileGuest parses what no agent of ours says.
func TestRepliesOfAHostileGuest(t *testing.T) {
	parse := func(b string) error {
		r := records{r: bufio.NewReader(strings.NewReader(b))}
		return readReplies(&r, func([]byte) error { return nil })
	}
	for b, want := range map[string]error{
		"":                       nil,
		"\x00":                   io.ErrUnexpectedEOF,
		"\x00\x00\x00\x00\x02x":  io.ErrUnexpectedEOF,
		"\x07\x00\x00\x00\x00":   ErrProtocol,
		"\x00\x00\x00\x00\x01xy": io.ErrUnexpectedEOF,
	} {
		if err := parse(b); !errors.Is(err, want) {
			t.Errorf("replies %q: %v", b, err)
		}
	}
	if err := parse("\x00\xff\xff\xff\xff"); !fault.Is(err, fault.Exhausted) {
		t.Errorf("a huge reply: %v", err)
	}
	if err := parse("\x01\x00\x00\x00\x08nonsense"); err == nil || fault.Of(err) != fault.Internal {
		t.Errorf("class %v, %v", fault.Of(err), err)
	}
	long := "canceled\n" + strings.Repeat("w", 1000)
	if err := parse("\x01\x00\x00\x03\xf1" + long); fault.Of(err) != fault.Canceled || len(err.Error()) > maxStatusText {
		t.Errorf("class %v, %v", fault.Of(err), err)
	}
}
