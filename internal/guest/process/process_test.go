package process

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestExitsAreToldApart(t *testing.T) {
	tab := newTable(t, nil)
	type got struct {
		Code             int
		Signal, Status   string
		Problem          string
		Normal, TimedOut bool
	}
	for name, tc := range map[string]struct {
		spec Spec
		want got
	}{
		"success": {shell("exit 0"), got{Status: "exit status 0", Normal: true}},
		"code":    {shell("exit 3"), got{Code: 3, Status: "exit status 3", Problem: "exit status 3", Normal: true}},
		"like a signal but a code": {shell("exit 137"),
			got{Code: 137, Status: "exit status 137", Problem: "exit status 137", Normal: true}},
		"signal": {shell("kill -TERM $$"),
			got{Code: 143, Signal: "SIGTERM", Status: "signal: terminated", Problem: "signal: terminated"}},
		"killed": {shell("kill -KILL $$"),
			got{Code: 137, Signal: "SIGKILL", Status: "signal: killed", Problem: "signal: killed"}},
		"timeout": {Spec{Cmd: "sleep", Args: []string{"100"}, Timeout: 50 * time.Millisecond},
			got{Code: 137, Signal: "SIGKILL", Status: "timed out", TimedOut: true,
				Problem: "timed out after 50ms: killed with everything it started"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, sub := start(t, tab, tc.spec)
			e := collect(t, sub).exit
			g := got{e.Code, e.SignalName(), e.Status(), e.Problem(), e.Normal(), e.TimedOut}
			if d := cmp.Diff(tc.want, g); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestOutOfMemoryIsTold(t *testing.T) {
	events := "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"
	if !oomKills(events) {
		t.Error("a kill for want of memory is not seen")
	}
	if oomKills(strings.ReplaceAll(events, "oom_kill 1", "oom_kill 0")) || oomKills("") {
		t.Error("a kill for want of memory is seen where none was")
	}
	e := Exit{Code: 137, Signal: unix.SIGKILL, OOMKilled: true}
	if !strings.Contains(e.Problem(), "out of memory") {
		t.Errorf("problem %q does not say why", e.Problem())
	}
}

func TestStreamsStayApartAndInOrder(t *testing.T) {
	tab := newTable(t, nil)
	_, sub := start(t, tab, shell("i=0; while [ $i -lt 2000 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done"))
	r := collect(t, sub)
	var out, errs strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&out, "out %d\n", i)
		fmt.Fprintf(&errs, "err %d\n", i)
	}
	if r.stdout() != out.String() {
		t.Errorf("stdout: %d bytes, want %d", len(r.stdout()), out.Len())
	}
	if r.stderr() != errs.String() {
		t.Errorf("stderr: %d bytes, want %d", len(r.stderr()), errs.Len())
	}
}

// The reader is far slower than the program; every byte must come, and the
// agent must not hold them all meanwhile.
func TestSlowReaderLosesNothing(t *testing.T) {
	const size = 100 << 20
	tab := newTable(t, nil)
	file := filepath.Join(t.TempDir(), "data")
	want := writePattern(t, file, size)
	p, sub := start(t, tab, Spec{Cmd: "cat", Args: []string{file}, NoStdin: true})
	second := p.Subscribe()
	defer second.Close()
	sum, sum2 := sha256.New(), sha256.New()
	n := 0
	for i := 0; ; i++ {
		ev, err := sub.Next(testenv.Context(t), 0)
		if err != nil {
			t.Fatal(err)
		}
		if ev.Kind == End {
			break
		}
		n += len(ev.Data)
		sum.Write(ev.Data)
		if held := tab.budget.used.Load(); held > 1<<20 {
			t.Fatalf("the log holds %d bytes", held)
		}
		// The second one takes its events only after the first did.
		ev, err = second.Next(testenv.Context(t), 0)
		if err != nil {
			t.Fatal(err)
		}
		sum2.Write(ev.Data)
	}
	for {
		ev, err := second.Next(testenv.Context(t), 0)
		if err != nil {
			t.Fatal(err)
		}
		if ev.Kind == End {
			break
		}
		sum2.Write(ev.Data)
	}
	if n != size || string(sum.Sum(nil)) != want || string(sum2.Sum(nil)) != want {
		t.Errorf("got %d bytes of %d, or other ones", n, size)
	}
}

func writePattern(t testing.TB, file string, size int) string {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	block := make([]byte, 64<<10)
	for off := 0; off < size; off += len(block) {
		for i := 0; i < len(block); i += 8 {
			copy(block[i:], strconv.FormatInt(int64(off+i)+10_000_000, 36))
		}
		n := min(len(block), size-off)
		if _, err := io.MultiWriter(f, sum).Write(block[:n]); err != nil {
			t.Fatal(err)
		}
	}
	return string(sum.Sum(nil))
}

func TestFastProgramsAlwaysEnd(t *testing.T) {
	tab := newTable(t, nil)
	for i := range 500 {
		_, sub := start(t, tab, Spec{Cmd: "true"})
		if e := collect(t, sub).exit; e.Code != 0 || !e.Normal() {
			t.Fatalf("run %d: %+v", i, e)
		}
		sub.Close()
	}
	eventually(t, "all cgroups removed", func() bool { return len(tab.groups.all()) == 0 })
}

func TestManyAtOnce(t *testing.T) {
	tab := newTable(t, nil)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			_, sub, err := tab.Start(testenv.Context(t), shell(fmt.Sprintf("echo %d; echo e%d >&2; exit %d", i, i, i%100)))
			if err != nil {
				t.Error(err)
				return
			}
			defer sub.Close()
			r, err := follow(testenv.Context(t), sub)
			if err != nil || r.stdout() != fmt.Sprintf("%d\n", i) || r.stderr() != fmt.Sprintf("e%d\n", i) || r.exit.Code != i%100 {
				t.Errorf("run %d: %q %q %+v %v", i, r.stdout(), r.stderr(), r.exit, err)
			}
		})
	}
	wg.Wait()
}

// A child in the background that holds the pipes, silent or busy, does not
// hold up the end, and lives on.
func TestBackgroundChildDoesNotHangTheCall(t *testing.T) {
	tab := newTable(t, nil)
	for name, child := range map[string]string{"silent": "sleep 1000", "busy": "yes"} {
		t.Run(name, func(t *testing.T) {
			p, sub := start(t, tab, shell(child+" & echo $! >&2; exit 7"))
			r := collect(t, sub)
			if r.exit.Code != 7 {
				t.Errorf("exit %+v", r.exit)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(r.stderr()))
			if err != nil {
				t.Fatalf("pid of the child: %v", err)
			}
			if !alive(pid) {
				t.Error("the child is dead")
			}
			// And yet it is within reach.
			if err := p.Signal(unix.SIGKILL, false); err != nil {
				t.Fatal(err)
			}
			eventually(t, "child dead", func() bool { return !alive(pid) })
		})
	}
	eventually(t, "all cgroups removed", func() bool { return len(tab.groups.all()) == 0 })
	for _, info := range tab.List() {
		p, err := tab.Find(Selector{Pid: info.Pid})
		noErr(t, err)
		for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
			if err := p.Signal(sig, true); !fault.Is(err, fault.NotFound) {
				t.Errorf("signal when nothing is left: %v", err)
			}
		}
	}
}

// What was written before the end of the program is delivered even when a
// child goes on writing.
func TestEverythingBeforeTheEndIsDelivered(t *testing.T) {
	tab := newTable(t, nil)
	for range 20 {
		_, sub := start(t, tab, shell("(while :; do echo noise >&2; done) & head -c 60000 /dev/zero; echo last; kill $!"))
		if out := collect(t, sub).stdout(); len(out) != 60005 || !strings.HasSuffix(out, "last\n") {
			t.Fatalf("%d bytes of stdout", len(out))
		}
	}
}

// The trees here fork twice and leave the session; only the cgroup holds them.
func TestKillEndsTheWholeTree(t *testing.T) {
	const script = `
		setsid sh -c 'setsid sleep 1000 & echo $!; exec sleep 1000' &
		(setsid setsid sleep 1000 & echo $!)
		echo $$; sleep 1000`
	tab := newTable(t, nil)
	for name, how := range map[string]struct {
		timeout time.Duration
		kill    func(*testing.T, *Process)
	}{
		"timeout":        {timeout: 3 * time.Second, kill: func(*testing.T, *Process) {}},
		"signal":         {kill: func(t *testing.T, p *Process) { noErr(t, p.Signal(unix.SIGKILL, false)) }},
		"one by one":     {kill: func(t *testing.T, p *Process) { noErr(t, p.group.signal(unix.SIGKILL)) }},
		"SIGTERM to all": {kill: func(t *testing.T, p *Process) { noErr(t, p.Signal(unix.SIGTERM, true)) }},
	} {
		t.Run(name, func(t *testing.T) {
			spec := shell(script)
			spec.Timeout = how.timeout
			p, sub := start(t, tab, spec)
			var pids []int
			var seen string
			for len(pids) < 3 {
				ev, err := sub.Next(testenv.Context(t), 0)
				noErr(t, err)
				if ev.Kind == End {
					t.Fatalf("ended before all had started: %+v", ev.Exit)
				}
				seen += string(ev.Data)
				pids = nil
				for line := range strings.Lines(seen) {
					if n, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && strings.HasSuffix(line, "\n") {
						pids = append(pids, n)
					}
				}
			}
			how.kill(t, p)
			r := collect(t, sub)
			if r.exit.TimedOut != (how.timeout > 0) || r.exit.Signal == 0 {
				t.Errorf("exit %+v", r.exit)
			}
			noErr(t, p.group.wait(testenv.Context(t)))
			for _, pid := range pids {
				if alive(pid) {
					t.Errorf("process %d of the tree lives", pid)
				}
			}
		})
	}
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

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

func TestReconnect(t *testing.T) {
	tab := newTable(t, nil)
	s := shell("echo one; echo two >&2; read x; echo three; exit 9")
	s.NoStdin, s.Tag = false, "job"
	p, sub := start(t, tab, s)
	await(t, sub, "one\n")
	sub.Close() // the client goes; the program does not
	if _, _, err := tab.Start(testenv.Context(t), s); !fault.Is(err, fault.Exists) {
		t.Errorf("second program with the tag: %v", err)
	}
	again, err := tab.Find(Selector{Tag: "job"})
	noErr(t, err)
	live := again.Subscribe()
	defer live.Close()
	noErr(t, p.Write(testenv.Context(t), []byte("go\n"), false))
	check := func(name string, sub *Subscription) {
		t.Helper()
		r := collect(t, sub)
		if r.stdout() != "one\nthree\n" || r.stderr() != "two\n" || r.exit.Code != 9 || sub.Missed() != 0 {
			t.Errorf("%s: %q %q %+v missed %d", name, r.stdout(), r.stderr(), r.exit, sub.Missed())
		}
	}
	check("live", live)
	for range 2 {
		late, err := tab.Find(Selector{Pid: p.Info().Pid})
		noErr(t, err)
		if !late.Info().Ended {
			t.Error("not told to have ended")
		}
		sub := late.Subscribe()
		defer sub.Close()
		check("late", sub)
	}
	// The tag is free again.
	_, next := start(t, tab, Spec{Cmd: "true", Tag: "job"})
	collect(t, next)
	if _, err := tab.Find(Selector{Pid: 1 << 30}); !fault.Is(err, fault.NotFound) {
		t.Errorf("unknown pid: %v", err)
	}
	if _, err := tab.Find(Selector{Tag: "none"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("unknown tag: %v", err)
	}
}

// Without a reader the program runs on, and the log keeps the end.
func TestNobodyReads(t *testing.T) {
	tab := newTable(t, func(p *Params) { p.Retain = 64 << 10 })
	p, sub := start(t, tab, shell("seq 200000; echo err >&2"))
	sub.Close()
	<-p.exited
	eventually(t, "retired", func() bool { return len(tab.running()) == 0 })
	late := p.Subscribe()
	defer late.Close()
	r := collect(t, late)
	all := 6*200000 + 88895 // seq 200000 writes 1288895 bytes
	if got := len(r.stdout()); got == 0 || got > 64<<10 || uint64(got)+late.Missed()+4 != uint64(all)+4 {
		t.Errorf("%d bytes kept, %d missed, of %d", got, late.Missed(), all)
	}
	if !strings.HasSuffix(r.stdout(), "199999\n200000\n") || r.stderr() != "err\n" {
		t.Errorf("the end of the output is not kept")
	}
}

func TestSubscriptionThatTakesNothingIsCutOff(t *testing.T) {
	tab := newTable(t, func(p *Params) { p.Stall = 3 * time.Second })
	p, sub := start(t, tab, shell("head -c 3000000 /dev/zero"))
	hung := p.Subscribe()
	defer hung.Close()
	r := collect(t, sub)
	if len(r.stdout()) != 3000000 {
		t.Errorf("the reader that takes got %d bytes", len(r.stdout()))
	}
	_, err := hung.Next(testenv.Context(t), 0)
	if !fault.Is(err, fault.Exhausted) {
		t.Errorf("the one that does not: %v", err)
	}
}

func TestIdleAndContext(t *testing.T) {
	tab := newTable(t, nil)
	_, sub := start(t, tab, shell("sleep 1000"))
	ev, err := sub.Next(testenv.Context(t), time.Millisecond)
	if err != nil || ev.Kind != Idle {
		t.Errorf("idle: %+v, %v", ev, err)
	}
	ctx, cancel := context.WithCancel(testenv.Context(t))
	cancel()
	if _, err := sub.Next(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	sub.Close()
	if _, err := sub.Next(testenv.Context(t), 0); !fault.Is(err, fault.Canceled) {
		t.Errorf("closed: %v", err)
	}
}

func TestEnvironmentAndUser(t *testing.T) {
	tab := newTable(t, nil)
	s := Spec{Cmd: "env", User: "nobody", Env: map[string]string{"MINE": "1", "HOME": "/x", "EMPTY": ""}}
	_, sub := start(t, tab, s)
	got := map[string]string{}
	for line := range strings.Lines(collect(t, sub).stdout()) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		got[k] = v
	}
	want := map[string]string{
		"SANDBOX": "yes", "MINE": "1", "HOME": "/x", "EMPTY": "", "USER": "nobody", "LOGNAME": "nobody",
		"SHELL": "/usr/sbin/nologin", "PATH": defaultPath,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestSupplementaryGroupsAndCapabilities(t *testing.T) {
	root := t.TempDir()
	noErr(t, os.MkdirAll(root+"/etc", 0o755))
	noErr(t, os.WriteFile(root+"/etc/passwd", []byte("root:x:0:0::/root:/bin/sh\napp:x:4001:4002::/nowhere:/bin/sh\n"), 0o644))
	noErr(t, os.WriteFile(root+"/etc/group", []byte("app:x:4002:\nextra:x:4003:other,app\nmore:x:4004:app\nnot:x:4005:apple\n"), 0o644))
	tab := newTable(t, func(p *Params) { p.Accounts = account.NewFiles(root) })
	for user, want := range map[string]string{
		"app":        "4001 4002 4002 4003 4004 /",
		"4001":       "4001 4002 4002 4003 4004 /",
		"app:extra":  "4001 4003 4003 /",
		"5000:6000":  "5000 6000 6000 /",
		"5000":       "5000 0 0 /",
		"root:extra": "0 4003 4003 ",
	} {
		s := shell("echo $(id -u) $(id -g) $(id -G) $(pwd); grep CapEff /proc/self/status; ls -l /proc/self/fd | wc -l")
		s.User = user
		_, sub := start(t, tab, s)
		lines := strings.Split(collect(t, sub).stdout(), "\n")
		if !strings.HasPrefix(lines[0], want) {
			t.Errorf("user %s: %q, want %q", user, lines[0], want)
		}
		if zero := strings.HasSuffix(lines[1], "0000000000000000"); zero == strings.HasPrefix(user, "root") {
			t.Errorf("user %s: %s", user, lines[1])
		}
		if lines[2] != "5" { // a head line, 0, 1, 2, and the one that ls has open itself
			t.Errorf("user %s: %s lines of descriptors: something of the agent leaked", user, lines[2])
		}
	}
}

func TestBadStarts(t *testing.T) {
	dir := t.TempDir()
	noErr(t, os.Chmod(dir, 0o755))
	noErr(t, os.WriteFile(dir+"/plain", []byte("x"), 0o644))
	noErr(t, os.WriteFile(dir+"/junk", []byte{0, 1, 2, 3}, 0o755))
	noErr(t, os.WriteFile(dir+"/script", []byte("#!/no/such/interpreter\n"), 0o755))
	noErr(t, os.Mkdir(dir+"/secret", 0o700))
	noErr(t, os.WriteFile(dir+"/secret/prog", []byte("#!/bin/sh\n"), 0o755))
	tab := newTable(t, nil)
	str := func(s string) *string { return &s }
	for name, tc := range map[string]struct {
		spec  Spec
		class fault.Class
		words string
	}{
		"no cmd":            {Spec{}, fault.Invalid, "process.cmd"},
		"unknown in PATH":   {Spec{Cmd: "no-such-program"}, fault.NotFound, `"no-such-program" not found in PATH`},
		"PATH of the call":  {Spec{Cmd: "true", Env: map[string]string{"PATH": dir}}, fault.NotFound, dir},
		"unknown path":      {Spec{Cmd: "/no/such"}, fault.NotFound, "does not exist"},
		"no interpreter":    {Spec{Cmd: dir + "/script"}, fault.NotFound, "interpreter"},
		"not executable":    {Spec{Cmd: dir + "/plain"}, fault.Denied, "may not be executed"},
		"a directory":       {Spec{Cmd: dir}, fault.Denied, "is a directory"},
		"not a program":     {Spec{Cmd: dir + "/junk"}, fault.Invalid, "not a program"},
		"out of reach":      {Spec{Cmd: dir + "/secret/prog", User: "nobody"}, fault.Denied, "may not be executed"},
		"no cwd":            {Spec{Cmd: "true", Cwd: str("/no/such")}, fault.Invalid, "process.cwd"},
		"cwd is a file":     {Spec{Cmd: "true", Cwd: str(dir + "/plain")}, fault.Invalid, "not a directory"},
		"cwd out of reach":  {Spec{Cmd: "true", Cwd: str(dir + "/secret"), User: "nobody"}, fault.Invalid, "may not enter"},
		"unknown user":      {Spec{Cmd: "true", User: "nobody-at-all"}, fault.Invalid, "unknown user"},
		"unknown caller":    {Spec{Cmd: "true", HeaderUser: "nobody-at-all"}, fault.Unauthenticated, "unknown user"},
		"NUL in an arg":     {Spec{Cmd: "true", Args: []string{"a\x00b"}}, fault.Invalid, "process.args[0]"},
		"= in a name":       {Spec{Cmd: "true", Env: map[string]string{"a=b": ""}}, fault.Invalid, "process.envs"},
		"too large for all": {Spec{Cmd: "true", Args: []string{strings.Repeat("x", 3<<20)}}, fault.Invalid, "larger than the kernel takes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := tab.Start(testenv.Context(t), tc.spec)
			if !fault.Is(err, tc.class) || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("got %v (%v), want %v with %q", err, fault.Of(err), tc.class, tc.words)
			}
		})
	}
	if n := len(tab.groups.all()); n != 0 {
		t.Errorf("%d cgroups left by starts that failed", n)
	}
	if tab.places != 0 || len(tab.List()) != 0 {
		t.Error("programs that never ran are counted")
	}
}

func TestLimits(t *testing.T) {
	tab := newTable(t, func(p *Params) { p.MaxLive, p.MaxEnded = 2, 3 })
	_, a := start(t, tab, shell("sleep 1000"))
	start(t, tab, shell("sleep 1000"))
	if _, _, err := tab.Start(testenv.Context(t), Spec{Cmd: "true"}); !fault.Is(err, fault.Exhausted) {
		t.Errorf("one too many: %v", err)
	}
	infos := tab.List()
	p, err := tab.Find(Selector{Pid: infos[0].Pid})
	noErr(t, err)
	noErr(t, p.Signal(unix.SIGKILL, false))
	collect(t, a)
	for i := range 6 {
		s := shell("exit " + strconv.Itoa(i))
		eventually(t, "room", func() bool { tab.mu.Lock(); defer tab.mu.Unlock(); return tab.places < 2 })
		_, sub := start(t, tab, s)
		collect(t, sub)
	}
	eventually(t, "three kept", func() bool { return len(tab.List()) == 4 })
}

func TestEndedProgramsExpire(t *testing.T) {
	tab := newTable(t, func(p *Params) { p.RetainEnded = 30 * time.Millisecond })
	_, sub := start(t, tab, shell("echo x"))
	collect(t, sub)
	eventually(t, "dropped", func() bool { return len(tab.List()) == 0 })
	if used := tab.budget.used.Load(); used != 0 {
		t.Errorf("%d bytes still charged", used)
	}
}

func TestShutdown(t *testing.T) {
	tab := newTable(t, nil)
	_, polite := start(t, tab, shell("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done"))
	_, stubborn := start(t, tab, shell("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
	_, left := start(t, tab, shell("trap '' TERM; (echo ready; while :; do sleep 0.01; done) &"))
	await(t, polite, "ready")
	await(t, stubborn, "ready")
	collect(t, left)
	noErr(t, tab.Shutdown(testenv.Context(t), 3*time.Second))
	if r := collect(t, polite); r.exit.Code != 0 || !strings.Contains(r.stdout(), "bye") {
		t.Errorf("the polite one: %q %+v", r.stdout(), r.exit)
	}
	if r := collect(t, stubborn); r.exit.Signal != unix.SIGKILL {
		t.Errorf("the stubborn one: %+v", r.exit)
	}
	if n := len(tab.groups.all()); n != 0 {
		t.Errorf("%d trees are left", n)
	}
	if _, _, err := tab.Start(testenv.Context(t), Spec{Cmd: "true"}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("start after it: %v", err)
	}
}

// An agent that was killed leaves trees; the next one knows them.
func TestTreesOfAnEarlierAgent(t *testing.T) {
	root := cgroupRoot(t)
	use := func(p *Params) { _ = unix.Rmdir(p.CgroupRoot); p.CgroupRoot = root }
	first := newTable(t, use)
	_, sub := start(t, first, shell("sleep 1000 & echo $!"))
	pid, err := strconv.Atoi(strings.TrimSpace(collect(t, sub).stdout()))
	noErr(t, err)
	noErr(t, os.Mkdir(root+"/p77", 0o755))
	second := newTable(t, use)
	if _, err := os.Stat(root + "/p77"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the empty one is still there: %v", err)
	}
	noErr(t, second.Shutdown(testenv.Context(t), 0))
	if alive(pid) {
		t.Error("a process of the earlier agent lives")
	}
}

func TestWithoutCgroups(t *testing.T) {
	tab := newTable(t, func(p *Params) { p.CgroupRoot = "" })
	s := shell("sleep 1000 & echo $!; wait")
	s.Timeout = 3 * time.Second
	_, sub := start(t, tab, s)
	r := collect(t, sub)
	pid, err := strconv.Atoi(strings.TrimSpace(r.stdout()))
	noErr(t, err)
	if !r.exit.TimedOut {
		t.Errorf("exit %+v", r.exit)
	}
	eventually(t, "the process group dead", func() bool { return !alive(pid) })
}

func TestCgroupRootMustBeOne(t *testing.T) {
	_, err := New(Params{Log: tabLog(), Accounts: account.NewFiles("/"), Defaults: account.Fixed{}, CgroupRoot: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "not on a cgroup2 filesystem") {
		t.Errorf("got %v", err)
	}
}
