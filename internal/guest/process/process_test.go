package process

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
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
		"one by one":     {kill: func(t *testing.T, p *Process) { noErr(t, p.group.killFrozen()) }},
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

// TestTimersAreOrdinary gives the agent's threads lazy timers, as PID 1 does;
// programs must not have them.
func TestTimersAreOrdinary(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 4e6, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }()
	tab := newTable(t, nil)
	_, sub, err := tab.Start(testenv.Context(t), Spec{Cmd: "cat", Args: []string{"/proc/self/timerslack_ns"}, NoStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	if got := collect(t, sub).out[Stdout].String(); got != "50000\n" {
		t.Errorf("timer slack %q", got)
	}
}
