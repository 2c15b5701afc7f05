package guestconn

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/testenv"
)

func connectTo(t testing.TB, a *agent) *Conn {
	t.Helper()
	c := New(Params{Dial: a.dial, Done: a.gone, guardExtra: 100 * time.Millisecond})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func get(t testing.TB, c *Conn, url string) (string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Transport().RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

func TestTypedCalls(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	hello, err := c.Ready(ctx)
	if diff := cmp.Diff(Hello{AgentVersion: "v9", Features: []string{"one", "two"}}, hello); err != nil || diff != "" {
		t.Errorf("hello: %v %s", err, diff)
	}
	facts, err := c.Configure(ctx, Config{ID: "sb-1", MachineID: "m", Address: "198.18.0.2/30", Gateway: "198.18.0.1", DNS: []string{"1.1.1.1"}, MTU: 1400, Env: map[string]string{"A": "b"}, DefaultUser: "u", DefaultCwd: "/d", BootID: "b"})
	if err != nil {
		t.Fatal(err)
	}
	got := a.configs[0]
	if len(got.GetEntropy()) < 32 || bytes.Equal(got.GetEntropy(), make([]byte, entropyLen)) {
		t.Error("no entropy was sent")
	}
	if got.GetSandboxId() != "sb-1" || got.GetNetwork().GetMtu() != 1400 || got.GetEnv()["A"] != "b" || got.GetDefaultUser() != "u" || got.GetBootId() != "b" {
		t.Errorf("configuration arrived as %v", got)
	}
	if facts.BootID != "b" || len(facts.Warnings) != maxTexts || len(facts.Warnings[1]) != maxText || strings.Contains(facts.Warnings[0], "\x1b") {
		t.Errorf("facts %.200v", facts)
	}
	want := Quiesced{Flush: time.Second, Freeze: 2, Sync: 3, Frozen: []string{"hutch", "odd."}}
	if quiet, err := c.Quiesce(ctx); err != nil || cmp.Diff(want, quiet) != "" {
		t.Errorf("quiesced %+v, %v", quiet, err)
	}
	if err := c.SyncClock(ctx); err != nil {
		t.Error(err)
	}
	if off := time.Until(a.now()).Abs(); off > time.Second {
		t.Errorf("its clock is off by %v", off)
	}
	if used, total, err := c.Memory(ctx); used != 70 || total != 100 || err != nil {
		t.Errorf("memory %d of %d, %v", used, total, err)
	}
	if err := c.Shutdown(ctx, 1500*time.Millisecond); err != nil {
		t.Error(err)
	}
	if n := a.conns.Load(); n > 2 {
		t.Errorf("%d HTTP connections for calls one after the other", n)
	}
}

func TestExec(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	input := bytes.Repeat([]byte("input"), 50_000)
	for name, tc := range map[string]struct {
		exec Exec
		want Result
	}{
		"all told":   {Exec{Cmd: "tell", Args: []string{"a", "b"}, User: "u", Cwd: "/w", Env: map[string]string{"E": "e"}}, Result{Stdout: []byte("a b u /w e"), Stderr: []byte("err"), ExitCode: 3}},
		"input":      {Exec{Cmd: "cat", Stdin: input}, Result{Stdout: input}},
		"input left": {Exec{Cmd: "quit", Stdin: input}, Result{}},
		"capped": {Exec{Cmd: "flood", MaxOutput: 100}, Result{
			Stdout: make([]byte, 100), Stderr: make([]byte, 100), StdoutTruncated: true, StderrTruncated: true,
		}},
		"exactly full": {Exec{Cmd: "flood", MaxOutput: 3200 << 10}, Result{Stdout: make([]byte, 3200<<10), Stderr: make([]byte, 1600<<10)}},
		"timed out":    {Exec{Cmd: "sleep", Timeout: 20 * time.Millisecond}, Result{Stdout: []byte("before"), ExitCode: 137, Signal: "SIGKILL", TimedOut: true}},
		"guard":        {Exec{Cmd: "hang", Timeout: time.Nanosecond}, Result{Stdout: []byte("before"), ExitCode: 137, Signal: "SIGKILL", TimedOut: true}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.Exec(ctx, tc.exec)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range []*Result{&tc.want, &got} { // megabytes are too much for Diff
				if len(r.Stdout) > 1000 {
					r.Stdout, r.Stderr = sum(r.Stdout), sum(r.Stderr)
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// sum stands for b: its length and digest.
func sum(b []byte) []byte { return fmt.Appendf(nil, "%d bytes, %x", len(b), sha256.Sum256(b)) }

func TestExecFails(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	for cmd, want := range map[string]fault.Class{
		"":        fault.Invalid,
		"missing": fault.NotFound,
		"vanish":  fault.Unavailable,
		"lost":    fault.Unavailable,
		"huge":    fault.Exhausted,
		"cut":     fault.Unavailable,
	} {
		res, err := c.Exec(ctx, Exec{Cmd: cmd})
		if !fault.Is(err, want) {
			t.Errorf("%q: %v (%v), want %v", cmd, err, fault.Of(err), want)
		}
		if res.ExitCode != 0 || res.Stdout != nil {
			t.Errorf("%q: error with a result", cmd)
		}
	}
	if _, err := c.Exec(ctx, Exec{Cmd: "never", Timeout: time.Millisecond}); !fault.Is(err, fault.Deadline) {
		t.Errorf("guest that starts nothing: %v, want deadline", err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := c.Exec(short, Exec{Cmd: "hang"}); !fault.Is(err, fault.Deadline) {
		t.Errorf("caller's deadline: %v, want deadline", err)
	}
	if _, err := c.Exec(ctx, Exec{Cmd: "tell"}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestReconnects(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	for i := range 6 {
		if body, err := get(t, c, "http://anything:1/hello"); err != nil || body != "anything:1 HTTP/2.0" {
			t.Fatalf("round %d: %q, %v", i, body, err)
		}
		was := a.links.Load()
		a.cut()
		for a.links.Load() == was {
			if _, err := c.Ready(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestRepeatsWhatIsSafe(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	if body, err := get(t, c, baseURL+"/once"); err != nil || body != "answer" {
		t.Errorf("GET over a cut: %q, %v", body, err)
	}
	a.gets.Store(0)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+"/once", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	if res, err := c.Transport().RoundTrip(req); err == nil {
		_ = res.Body.Close()
		t.Error("POST over a cut was repeated")
	}
	if n := a.gets.Load(); n != 1 {
		t.Errorf("POST arrived %d times", n)
	}
}

func TestCallsWaitForGuest(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	boot := make(chan struct{})
	c := New(Params{Dial: func(ctx context.Context) (net.Conn, error) {
		select {
		case <-boot:
			return a.dial(ctx)
		default:
			return nil, errors.New("nobody there")
		}
	}})
	defer c.Close()
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := c.Ready(short)
	if !fault.Is(err, fault.Deadline) || !strings.Contains(err.Error(), "nobody there") {
		t.Errorf("%v, want a deadline that tells the last failure", err)
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := c.Exec(ctx, Exec{Cmd: "tell"}); err != nil {
				t.Error(err)
			}
		})
	}
	close(boot)
	wg.Wait()
}

// TestVersionMismatchIsTold has a guest whose agent speaks no version of ours:
// waiting would not mend it.
func TestVersionMismatchIsTold(t *testing.T) {
	testenv.CheckGoroutines(t)
	c := New(Params{Dial: func(context.Context) (net.Conn, error) {
		return nil, &link.VersionError{HostMin: 1, HostMax: 1, GuestMin: 2, GuestMax: 2}
	}})
	defer c.Close()
	_, err := c.Exec(testenv.Context(t), Exec{Cmd: "tell"})
	var version *link.VersionError
	if !fault.Is(err, fault.Precondition) || !errors.As(err, &version) {
		t.Errorf("%v (%v), want precondition with the versions", err, fault.Of(err))
	}
}

func TestDialPort(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		peer, err := l.Accept()
		if err != nil {
			return
		}
		defer peer.Close()
		_, _ = io.Copy(peer, peer)
	})
	conn, err := c.DialPort(ctx, port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = conn.Write([]byte("ping"))
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(conn); err != nil || string(b) != "ping" {
		t.Errorf("%q, %v", b, err)
	}
	_ = l.Close()
	_, err = c.DialPort(ctx, port)
	var status *link.StatusError
	if !fault.Is(err, fault.Unavailable) || !errors.As(err, &status) || status.Status != link.StatusRefused {
		t.Errorf("closed port: %v", err)
	}
	if _, err := c.DialPort(ctx, 0); !fault.Is(err, fault.Invalid) {
		t.Errorf("port 0: %v, want invalid", err)
	}
}

func TestEnds(t *testing.T) {
	for name, end := range map[string]func(*agent, *Conn){
		"closed":  func(_ *agent, c *Conn) { _ = c.Close() },
		"VM gone": func(a *agent, _ *Conn) { close(a.gone) },
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckGoroutines(t)
			ctx, a := testenv.Context(t), startAgent(t)
			c := connectTo(t, a)
			if _, err := c.Exec(ctx, Exec{Cmd: "tell"}); err != nil {
				t.Fatal(err)
			}
			failed := make(chan error, 1)
			go func() {
				_, err := c.Exec(ctx, Exec{Cmd: "hang"})
				failed <- err
			}()
			end(a, c)
			if err := <-failed; !fault.Is(err, fault.Unavailable) {
				t.Errorf("call in flight: %v, want unavailable", err)
			}
			if _, err := c.Ready(ctx); !fault.Is(err, fault.Unavailable) {
				t.Errorf("later call: %v, want unavailable", err)
			}
			if _, err := get(t, c, baseURL+"/hello"); err == nil {
				t.Error("a request went through")
			}
		})
	}
}

// TestGivenUpCallsLeaveNothing has calls time out at a guest that answers no
// stream, as a paused one does.
func TestGivenUpCallsLeaveNothing(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx := testenv.Context(t)
	silent := make(chan net.Conn, 1)
	l, err := link.Listen(link.ListenParams{Open: func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case c := <-silent:
			return wire{c}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := New(Params{Dial: func(context.Context) (net.Conn, error) {
		host, guest := net.Pipe()
		silent <- guest
		return host, nil
	}})
	defer c.Close()
	if _, err := c.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	for range link.MaxStreams + 10 {
		short, cancel := context.WithTimeout(ctx, 2*time.Millisecond)
		_, _, err := c.Memory(short)
		cancel()
		if !fault.Is(err, fault.Deadline) {
			t.Fatalf("%v (%v), want deadline", err, fault.Of(err))
		}
	}
	// The streams of those calls are free again.
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := c.DialPort(short, 1); !fault.Is(err, fault.Denied) {
		t.Errorf("%v, want the guest's denial", err)
	}
}
