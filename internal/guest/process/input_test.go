package process

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestStdin(t *testing.T) {
	tab := newTable(t, nil)
	p, sub := start(t, tab, Spec{Cmd: "sh", Args: []string{"-c", "sha256sum; echo after"}})
	const size = 64 << 20
	sum := sha256.New()
	block := make([]byte, 1<<20)
	for i := range size / len(block) {
		block[i] = byte(i + 1)
		sum.Write(block)
		noErr(t, p.Write(testenv.Context(t), block, false))
	}
	noErr(t, p.CloseInput())
	noErr(t, p.CloseInput())
	r := collect(t, sub)
	if want := fmt.Sprintf("%x  -\nafter\n", sum.Sum(nil)); r.stdout() != want {
		t.Errorf("got %q, want %q", r.stdout(), want)
	}
	if err := p.Write(testenv.Context(t), []byte("x"), false); !fault.Is(err, fault.Precondition) {
		t.Errorf("input after the end: %v", err)
	}
}

// Both directions at once, larger than any pipe.
func TestStdinAndOutputTogether(t *testing.T) {
	tab := newTable(t, nil)
	p, sub := start(t, tab, Spec{Cmd: "cat"})
	const size = 64 << 20
	var wg sync.WaitGroup
	in, out := sha256.New(), sha256.New()
	wg.Go(func() {
		block := make([]byte, 300_000)
		for left := size; left > 0; left -= len(block) {
			block = block[:min(left, len(block))]
			for i := range block {
				block[i] = byte(left >> (i % 20))
			}
			in.Write(block)
			if err := p.Write(testenv.Context(t), block, false); err != nil {
				t.Errorf("write: %v", err)
				return
			}
		}
		if err := p.CloseInput(); err != nil {
			t.Error(err)
		}
	})
	for {
		ev, err := sub.Next(testenv.Context(t), 0)
		noErr(t, err)
		if ev.Kind == End {
			break
		}
		out.Write(ev.Data)
	}
	wg.Wait()
	if string(in.Sum(nil)) != string(out.Sum(nil)) {
		t.Error("cat gave back other bytes")
	}
}

func TestInputErrors(t *testing.T) {
	tab := newTable(t, nil)
	ctx := testenv.Context(t)
	p, _ := start(t, tab, shell("sleep 1000"))
	if err := p.Write(ctx, []byte("x"), false); !fault.Is(err, fault.Precondition) {
		t.Errorf("no stdin: %v", err)
	}
	if err := p.Write(ctx, []byte("x"), true); !fault.Is(err, fault.Invalid) {
		t.Errorf("no terminal: %v", err)
	}
	if err := p.Resize(Size{80, 24}); !fault.Is(err, fault.Precondition) {
		t.Errorf("resize without terminal: %v", err)
	}
	// A program that never reads: the call ends with its context, and says
	// what was taken.
	p, _ = start(t, tab, Spec{Cmd: "sleep", Args: []string{"1000"}})
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	err := p.Write(short, make([]byte, 1<<20), false)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "of 1048576 bytes") {
		t.Errorf("write that nobody reads: %v", err)
	}
	// The next writer is not harmed by it, and the program's end wakes it.
	done := make(chan error, 1)
	go func() { done <- p.Write(ctx, make([]byte, 1<<20), false) }()
	noErr(t, p.Signal(unix.SIGTERM, false))
	if err := <-done; !fault.Is(err, fault.Precondition) {
		t.Errorf("write to a program that ended: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	tab := newTable(t, nil)
	p, sub := start(t, tab, Spec{Cmd: "sh", Args: []string{"-c", `
		stty size; echo TERM=$TERM; tty; [ "$(stat -c %u $(tty))" = 65534 ] && echo mine
		trap 'stty size; exit 5' WINCH; echo ready; while read x; do echo got $x; done`},
		User: "nobody", Size: &Size{Cols: 100, Rows: 30}})
	first := await(t, sub, "ready")
	for _, want := range []string{"30 100\r\n", "TERM=xterm-256color\r\n", "/dev/pts/", "mine\r\n"} {
		if !strings.Contains(first, want) {
			t.Errorf("%q is not in %q", want, first)
		}
	}
	noErr(t, p.Write(testenv.Context(t), []byte("hello\n"), true))
	await(t, sub, "got hello")
	if err := p.CloseInput(); !fault.Is(err, fault.Precondition) {
		t.Errorf("close the input of a terminal: %v", err)
	}
	if err := p.Resize(Size{}); !fault.Is(err, fault.Invalid) {
		t.Errorf("resize to nothing: %v", err)
	}
	noErr(t, p.Resize(Size{Cols: 132, Rows: 43}))
	// dash runs the trap after the read that the signal does not end.
	noErr(t, p.Write(testenv.Context(t), []byte("\n"), true))
	r := collect(t, sub)
	if out := r.out[Terminal].String(); !strings.Contains(out, "43 132\r\n") || r.exit.Code != 5 {
		t.Errorf("after the resize: %q, %+v", out, r.exit)
	}
}

func TestTerminalEdges(t *testing.T) {
	tab := newTable(t, nil)
	for name, tc := range map[string]struct{ script, want string }{
		"all of a long output":        {"seq 20000 | tail -c 100000", "20000\r\n"},
		"reopened by name":            {"exec </dev/null >/dev/null 2>&1; sleep 0.05; echo again >/dev/tty", "again\r\n"},
		"background child left alone": {"trap '' HUP; sleep 1000 & echo done", "done\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := shell(tc.script)
			s.Size = &Size{}
			_, sub := start(t, tab, s)
			r := collect(t, sub)
			if out := r.out[Terminal].String(); !strings.HasSuffix(out, tc.want) || r.exit.Code != 0 {
				t.Errorf("%d bytes, ends in %q, %+v", len(out), out[max(0, len(out)-40):], r.exit)
			}
		})
	}
}
