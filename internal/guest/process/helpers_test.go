package process

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/testenv"
)

// newTable returns a table with cgroups that the test's end closes.
func newTable(t testing.TB, change func(*Params)) *Table {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	p := Params{
		Log: slog.New(slog.DiscardHandler), Accounts: account.NewFiles("/"),
		Defaults: account.Fixed{EnvMap: map[string]string{"SANDBOX": "yes"}}, CgroupRoot: testenv.Cgroup(t),
	}
	if change != nil {
		change(&p)
	}
	tab, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := tab.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return tab
}

func shell(script string) Spec {
	return Spec{Cmd: "/bin/sh", Args: []string{"-c", script}, NoStdin: true}
}

func start(t testing.TB, tab *Table, spec Spec) (*Process, *Subscription) {
	t.Helper()
	p, sub, err := tab.Start(testenv.Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sub.Close)
	return p, sub
}

// result is everything that a subscription saw.
type result struct {
	out  map[Stream]*bytes.Buffer
	exit Exit
}

func (r result) stdout() string { return r.out[Stdout].String() }
func (r result) stderr() string { return r.out[Stderr].String() }

// collect follows sub to the End.
func collect(t testing.TB, sub *Subscription) result {
	t.Helper()
	r, err := follow(testenv.Context(t), sub)
	if err != nil {
		t.Fatalf("follow output: %v", err)
	}
	return r
}

func follow(ctx context.Context, sub *Subscription) (result, error) {
	r := result{out: map[Stream]*bytes.Buffer{Stdout: {}, Stderr: {}, Terminal: {}}}
	for {
		ev, err := sub.Next(ctx, 0)
		if err != nil {
			return r, err
		}
		switch ev.Kind {
		case Data:
			if len(ev.Data) == 0 || len(ev.Data) > segmentBytes {
				return r, fmt.Errorf("event of %d bytes", len(ev.Data))
			}
			r.out[ev.Stream].Write(ev.Data)
		case End:
			r.exit = ev.Exit
			return r, nil
		}
	}
}

// await takes output until it holds want.
func await(t testing.TB, sub *Subscription, want string) string {
	t.Helper()
	var seen strings.Builder
	for !strings.Contains(seen.String(), want) {
		ev, err := sub.Next(testenv.Context(t), 0)
		if err != nil {
			t.Fatalf("waiting for %q: %v; seen %q", want, err, seen.String())
		}
		if ev.Kind == End {
			t.Fatalf("ended before %q; seen %q", want, seen.String())
		}
		seen.Write(ev.Data)
	}
	return seen.String()
}

// eventually waits for a condition that nothing announces.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-testenv.Context(t).Done():
			t.Fatalf("never came: %s", what)
		}
	}
}

func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func tabLog() *slog.Logger { return slog.New(slog.DiscardHandler) }
