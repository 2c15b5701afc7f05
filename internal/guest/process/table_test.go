package process

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/testenv"
)

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
	root := testenv.Cgroup(t)
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

// countingGate refuses or lets in, and counts who is inside.
type countingGate struct {
	err    error
	inside int
}

func (g *countingGate) Enter(context.Context) error {
	if g.err == nil {
		g.inside++
	}
	return g.err
}

func (g *countingGate) Leave() { g.inside-- }

func TestStartsPassTheGate(t *testing.T) {
	gate := &countingGate{err: fault.New(fault.Unavailable, "not now")}
	tab := newTable(t, func(p *Params) { p.Gate = gate })
	spec := shell("true")
	spec.Tag = "one"
	if _, _, err := tab.Start(testenv.Context(t), spec); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a shut gate: %v", err)
	}
	gate.err = nil
	_, sub := start(t, tab, spec) // the tag is free
	if collect(t, sub).exit.Code != 0 || gate.inside != 0 {
		t.Errorf("%d starts are inside after one", gate.inside)
	}
	if _, _, err := tab.Start(testenv.Context(t), Spec{}); err == nil || gate.inside != 0 {
		t.Errorf("%d starts are inside after one that failed: %v", gate.inside, err)
	}
}
