package guestconn

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/rpcx"
)

func TestFake(t *testing.T) {
	release := make(chan struct{})
	boom := errors.New("boom")
	f := &Fake{Released: release, Says: Hello{AgentVersion: "f"}, Err: func(call string) error {
		if call == "Memory" {
			return boom
		}
		return nil
	}, OnExec: func(_ context.Context, e Exec) (Result, error) { return Result{Stdout: []byte(e.Cmd)}, nil }}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Ready(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("ready: %v, want canceled", err)
	}
	close(release)
	if h, err := f.Ready(t.Context()); err != nil || h.AgentVersion != "f" {
		t.Errorf("ready: %v, %v", h, err)
	}
	if _, _, err := f.Memory(t.Context()); !errors.Is(err, boom) {
		t.Errorf("memory: %v, want boom", err)
	}
	if r, err := f.Exec(t.Context(), Exec{Cmd: "x"}); err != nil || string(r.Stdout) != "x" {
		t.Errorf("exec: %v, %v", r, err)
	}
	if _, err := f.Configure(t.Context(), Config{ID: "i"}); err != nil || f.Configs()[0].ID != "i" {
		t.Errorf("configure: %v, %v", f.Configs(), err)
	}
	if _, err := f.Quiesce(t.Context()); err != nil {
		t.Errorf("quiesce: %v", err)
	}
	_ = f.Close()
	if _, err := f.Ready(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("ready after close: %v, want unavailable", err)
	}
	if diff := cmp.Diff([]string{"Ready", "Ready", "Memory", "Exec", "Configure", "Quiesce", "Close", "Ready"}, f.Calls()); diff != "" {
		t.Error(diff)
	}
}

func TestGuestCannotAskForCredentials(t *testing.T) {
	err := callError("exec", rpcx.ToConnect(fault.New(fault.Unauthenticated, "who are you")))
	if fault.Of(err) != fault.Internal {
		t.Errorf("class %s: %v", fault.Of(err), err)
	}
	if err := callError("exec", rpcx.ToConnect(fault.New(fault.NotFound, "no ls"))); fault.Of(err) != fault.NotFound {
		t.Errorf("class %s: %v", fault.Of(err), err)
	}
}
