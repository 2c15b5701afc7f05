package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// place is where the supervisors of one test work.
type place struct {
	t       *testing.T
	cgroups string
	dir     string
}

func newPlace(t *testing.T) place {
	t.Helper()
	root := testenv.Cgroup(t)
	t.Cleanup(func() { sweep(t, root) })
	testenv.CheckGoroutines(t)
	return place{t, filepath.Join(root, "services"), filepath.Join(t.TempDir(), "run")}
}

// sweep kills what a test left in its cgroups and removes them.
func sweep(t *testing.T, root string) {
	for _, dir := range []string{"services/a", "services/b", "services/c", "services"} {
		dir = filepath.Join(root, dir)
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
			if err := unix.Rmdir(dir); err == nil || err == unix.ENOENT {
				break
			}
		}
	}
}

// start returns a supervisor that the test's end closes.
func (p place) start() *Supervisor {
	s := New(Params{Cgroups: p.cgroups, Dir: p.dir, Log: slog.New(slog.DiscardHandler), pace: pace{
		firstPause: 30 * time.Millisecond, maxPause: 120 * time.Millisecond, firstLook: time.Millisecond, lastLook: 5 * time.Millisecond,
	}})
	p.t.Cleanup(s.Close)
	return s
}

func define(t *testing.T, s *Supervisor, units ...Unit) {
	t.Helper()
	for _, u := range units {
		if err := s.Define(u); err != nil {
			t.Fatal(err)
		}
	}
}

// shell is a unit that runs a script.
func shell(name, script string) Unit { return Unit{Name: name, Argv: []string{"sh", "-c", script}} }

// stays is a script that ends at once when asked to.
const stays = "trap 'exit 0' TERM; while :; do sleep 0.05; done"

// await waits for a state.
func await(t *testing.T, s *Supervisor, name string, want func(Status) bool) Status {
	t.Helper()
	ctx := testenv.Context(t)
	for {
		st, changed := s.Status(name)
		if want(st) {
			return st
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("%s stays %s: %s", name, st.State, st.Detail())
		}
	}
}

func ready(t *testing.T, s *Supervisor, name string) Status {
	t.Helper()
	return await(t, s, name, func(st Status) bool { return st.State == Ready })
}

func begin(t *testing.T, s *Supervisor, name string) Status {
	t.Helper()
	if err := s.Start(name); err != nil {
		t.Fatal(err)
	}
	return ready(t, s, name)
}

func stop(t *testing.T, s *Supervisor, name string, limit time.Duration) {
	t.Helper()
	if err := s.Stop(testenv.Context(t), name, limit); err != nil {
		t.Error(err)
	}
}

func kill(t *testing.T, st Status) {
	t.Helper()
	if err := unix.Kill(st.PID, unix.SIGKILL); err != nil {
		t.Error(err)
	}
}

func alive(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(b), ") Z ")
}

func logOf(t *testing.T, s *Supervisor, name string) string {
	t.Helper()
	var b strings.Builder
	err := s.Follow(testenv.Context(t), name, 0, false, func(c Chunk) error { b.Write(c.Data); return nil })
	if err != nil {
		t.Error(err)
	}
	return b.String()
}

// awaitLog waits until enough says so of a unit's log. A line is no change of
// the unit's status.
func awaitLog(t *testing.T, s *Supervisor, name string, enough func(log string) bool) {
	t.Helper()
	var b strings.Builder
	errEnough := errors.New("enough")
	err := s.Follow(testenv.Context(t), name, 0, true, func(c Chunk) error {
		b.Write(c.Data)
		if enough(b.String()) {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		t.Fatalf("log of %s: %v, with %q", name, err, b.String())
	}
}

// says is that a log has a text, n times at least.
func says(text string, n int) func(string) bool {
	return func(log string) bool { return strings.Count(log, text) >= n }
}

func TestAUnitRunsWhereItBelongs(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	u := shell("a", "echo $0 $GREETING $HOME; pwd; "+stays)
	u.Env, u.Cwd, u.OOMScoreAdj, u.MemoryMin = []string{"GREETING=hi"}, "/proc", 100, 1<<20
	define(t, s, u)
	if st, _ := s.Status("a"); st.State != Stopped || st.Detail() != "stopped" || st.Word() != WordNotReady {
		t.Errorf("before: %+v", st)
	}
	st := begin(t, s, "a")
	for file, want := range map[string]string{"cgroup": "/services/a\n", "oom_score_adj": "100\n"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", st.PID, file))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %q, %v", file, b, err)
		}
	}
	if err := s.Start("a"); err != nil {
		t.Error(err)
	}
	if again, _ := s.Status("a"); again.PID != st.PID || again.Word() != WordReady {
		t.Errorf("a second start: %+v", again)
	}
	stop(t, s, "a", 0)
	if after, _ := s.Status("a"); after.State != Stopped || after.Crashes != 0 || after.Last == nil || after.Last.String() != "exit status 0" {
		t.Errorf("afterwards: %+v", after)
	}
	if s.Left("a") || alive(st.PID) {
		t.Errorf("left a note %v, or the process", s.Left("a"))
	}
	if got := logOf(t, s, "a"); got != "sh hi /root\n/proc\n" {
		t.Errorf("log %q", got)
	}
	if err := s.Start("none"); !errors.Is(err, errNoUnit) {
		t.Errorf("start of nothing: %v", err)
	}
}

// TestACrashedUnitComesBack kills one that was ready, which comes back at once,
// and again.
func TestACrashedUnitComesBack(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	u := shell("a", "echo last words >&2; "+stays)
	var cleaned, prepared int
	u.Prepare = func(context.Context) error { prepared++; return nil }
	u.CleanUp = func(context.Context) error { cleaned++; return nil }
	define(t, s, u)
	first := begin(t, s, "a")
	awaitLog(t, s, "a", says("last words\n", 1))
	kill(t, first)
	second := await(t, s, "a", func(st Status) bool { return st.Crashes == 1 && st.State == Ready })
	if second.PID == first.PID || second.Last.Signal != unix.SIGKILL || second.Detail() != "running; crashed once, last: killed by signal SIGKILL: last words" {
		t.Errorf("after a crash: %+v, %s", second, second.Detail())
	}
	awaitLog(t, s, "a", says("last words\n", 2))
	kill(t, second)
	failed := await(t, s, "a", func(st Status) bool { return st.Crashes == 2 })
	if failed.State != Failed || failed.Word() != WordError || !strings.Contains(failed.Detail(), "crashed 2 times") || !strings.Contains(failed.Detail(), "next start in") {
		t.Errorf("after a second crash: %s", failed.Detail())
	}
	ready(t, s, "a")
	awaitLog(t, s, "a", says("last words\n", 3))
	stop(t, s, "a", 0)
	if cleaned != 3 || prepared != 3 {
		t.Errorf("prepared %d times, cleaned up %d times", prepared, cleaned)
	}
	if text := logOf(t, s, "a"); strings.Count(text, "last words\n") != 3 || !strings.Contains(text, "[hutch-agent] killed by signal SIGKILL, next start in 0s\n") {
		t.Errorf("log %q", text)
	}
}

// TestACrashLoopSlowsDown runs a program that is never ready.
func TestACrashLoopSlowsDown(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	u := shell("a", "echo cannot >&2; exit 3")
	u.Ready = func(context.Context) (string, error) { return "", errors.New("not yet") }
	define(t, s, u)
	if err := s.Start("a"); err != nil {
		t.Fatal(err)
	}
	st := await(t, s, "a", func(st Status) bool { return st.Crashes == 4 })
	if left := time.Until(st.Next); st.State != Failed || left > 120*time.Millisecond {
		t.Errorf("state %s, next start in %v", st.State, left)
	}
	if !strings.Contains(st.Detail(), "crashed 4 times, last: exit status 3: cannot") {
		t.Errorf("detail %q", st.Detail())
	}
	stop(t, s, "a", 0)
}

func TestBackoff(t *testing.T) {
	var p pace
	p.setDefaults()
	b := backoff{pace: p}
	var got []time.Duration
	for range 9 {
		got = append(got, b.after(true, time.Second))
	}
	got = append(got, b.after(true, time.Minute), b.after(false, 0), b.after(false, 0))
	ms := time.Millisecond
	want := []time.Duration{0, 500 * ms, 1000 * ms, 2000 * ms, 4000 * ms, 8000 * ms, 16000 * ms, 30000 * ms, 30000 * ms, 0, 500 * ms, 1000 * ms}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pauses (-want +got):\n%s", diff)
	}
	b = backoff{pace: p}
	if first := b.after(false, 0); first != 500*ms {
		t.Errorf("after a first start that did not work out: %v", first)
	}
}

func TestWhatCannotStartIsTold(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	broken := shell("b", stays)
	broken.Prepare = func(context.Context) error { return errors.New("no\nmodules") }
	define(t, s, Unit{Name: "a", Argv: []string{"no-such-program"}}, broken)
	for name, want := range map[string]string{"a": "failed: start a: program no-such-program is not in " + Path, "b": "failed: prepare: no modules"} {
		if err := s.Start(name); err != nil {
			t.Fatal(err)
		}
		st, err := s.Await(testenv.Context(t), name)
		if err != nil || st.State != Failed || !strings.HasPrefix(st.Detail(), want) || st.Crashes != 0 {
			t.Errorf("%s: %v, %s", name, err, st.Detail())
		}
		stop(t, s, name, 0)
	}
	for _, bad := range []Unit{{Name: "A", Argv: []string{"x"}}, {Name: "a/b", Argv: []string{"x"}}, {Name: "x"}, {Name: "x", Argv: []string{"x"}, Needs: []string{"y"}}, {}} {
		if err := s.Define(bad); err == nil {
			t.Errorf("%+v can be defined", bad)
		}
	}
}

// TestNeedsComeFirstAndGoLast starts the last of a chain and stops the first.
func TestNeedsComeFirstAndGoLast(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	var mu sync.Mutex
	var told []string
	say := func(what string) { mu.Lock(); told = append(told, what); mu.Unlock() }
	open := make(chan struct{})
	for _, u := range []Unit{shell("a", stays), shell("b", stays), shell("c", stays)} {
		switch u.Name {
		case "a":
			u.Ready = func(ctx context.Context) (string, error) {
				select {
				case <-open:
					return "fine", nil
				case <-ctx.Done():
					return "", ctx.Err()
				}
			}
		default:
			u.Needs = []string{string(u.Name[0] - 1)}
		}
		name := u.Name
		u.Prepare = func(context.Context) error { say("start " + name); return nil }
		u.CleanUp = func(context.Context) error { say("stop " + name); return nil }
		define(t, s, u)
	}
	if err := s.Start("c"); err != nil {
		t.Fatal(err)
	}
	st := await(t, s, "c", func(st Status) bool { return st.State == Waiting })
	if !strings.HasPrefix(st.Detail(), "waiting: for b: waiting: for a") && !strings.HasPrefix(st.Detail(), "waiting: for b: ") {
		t.Errorf("c says %q", st.Detail())
	}
	close(open)
	ready(t, s, "c")
	if st, _ := s.Status("a"); st.Detail() != "fine" {
		t.Errorf("a says %q", st.Detail())
	}
	// One that is needed may crash; the others go on.
	c, _ := s.Status("c")
	a, _ := s.Status("a")
	kill(t, a)
	await(t, s, "a", func(st Status) bool { return st.Crashes == 1 && st.State == Ready })
	if now, _ := s.Status("c"); now.PID != c.PID {
		t.Errorf("c was started again")
	}
	stop(t, s, "a", 0)
	want := []string{"start a", "start b", "start c", "stop a", "start a", "stop c", "stop b", "stop a"}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
}

// TestStopOfWhatWaits stops a unit whose need never becomes ready.
func TestStopOfWhatWaits(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	a := shell("a", stays)
	a.Ready = func(context.Context) (string, error) { return "", errors.New("never") }
	b := shell("b", stays)
	b.Needs = []string{"a"}
	define(t, s, a, b)
	if err := s.Start("b"); err != nil {
		t.Fatal(err)
	}
	await(t, s, "b", func(st Status) bool { return st.State == Waiting })
	stop(t, s, "b", 0)
	if st, _ := s.Status("a"); st.State != Starting {
		t.Errorf("a is %s", st.State)
	}
	stop(t, s, "a", 0)
}

// deaf is a script that does not end when asked to.
const deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done"

func TestADeafUnitIsKilled(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	u := shell("a", deaf)
	u.KillRest = true
	define(t, s, u)
	begin(t, s, "a")
	awaitLog(t, s, "a", says("up\n", 1))
	long := make(chan error, 1)
	go func() { long <- s.Stop(testenv.Context(t), "a", time.Hour) }()
	await(t, s, "a", func(st Status) bool { return st.State == Stopping })
	if err := s.Start("a"); err == nil {
		t.Error("a unit that is being stopped can be started")
	}
	stop(t, s, "a", -1) // shortens the other
	if err := <-long; err != nil {
		t.Error(err)
	}
	if st, _ := s.Status("a"); st.Last == nil || st.Last.Signal != unix.SIGKILL {
		t.Errorf("last %v", st.Last)
	}
}

// TestWhatComesBeforeTheSignal runs inside the time of the stop.
func TestWhatComesBeforeTheSignal(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	u := shell("a", stays)
	entered := make(chan struct{}, 1)
	u.BeforeStop = func(ctx context.Context) error {
		if _, bounded := ctx.Deadline(); !bounded {
			t.Error("it has no deadline")
		}
		entered <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	define(t, s, u)
	st := begin(t, s, "a")
	stop(t, s, "a", 50*time.Millisecond)
	<-entered
	if alive(st.PID) {
		t.Error("the program outlives its time")
	}
	// When the program ends meanwhile, nobody waits longer.
	st = begin(t, s, "a")
	done := make(chan error, 1)
	go func() { done <- s.Stop(testenv.Context(t), "a", time.Hour) }()
	<-entered
	kill(t, st)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestOnlyAStopKillsTheRest looks at a child that its service left.
func TestOnlyAStopKillsTheRest(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	file := filepath.Join(t.TempDir(), "pid")
	u := shell("a", "test -e "+file+" || { setsid sleep 300 & echo $! > "+file+"; }; "+stays)
	u.KillRest = true
	u.Ready = func(context.Context) (string, error) { _, err := os.Stat(file); return "", err }
	define(t, s, u)
	st := begin(t, s, "a")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	kill(t, st)
	await(t, s, "a", func(st Status) bool { return st.Crashes == 1 && st.State == Ready })
	if !alive(child) {
		t.Error("a crash killed a child")
	}
	stop(t, s, "a", 0)
	for ctx := testenv.Context(t); alive(child); {
		if ctx.Err() != nil {
			t.Fatal("a stop left a child")
		}
	}
}

func TestShutdown(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	var mu sync.Mutex
	var order []string
	var limits []time.Duration
	for _, name := range []string{"a", "b", "c"} {
		u := shell(name, stays)
		u.StopTimeout = 10 * time.Second
		u.BeforeStop = func(ctx context.Context) error {
			deadline, _ := ctx.Deadline()
			mu.Lock()
			defer mu.Unlock()
			order, limits = append(order, name), append(limits, time.Until(deadline))
			return nil
		}
		define(t, s, u)
	}
	begin(t, s, "a")
	begin(t, s, "c")
	if !s.Wanted() {
		t.Error("nothing is wanted")
	}
	if err := s.Shutdown(testenv.Context(t), 20*time.Second); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"c", "a"}, order); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
	if limits[0] > 10*time.Second || limits[1] < 10*time.Second {
		t.Errorf("times %v: the first gets its share, the last all that is left", limits)
	}
	if err := s.Start("b"); !errors.Is(err, errEnding) || s.Wanted() {
		t.Errorf("start afterwards: %v", err)
	}
}

// TestShutdownWithoutTime kills, also what does not listen.
func TestShutdownWithoutTime(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	u := shell("a", deaf)
	u.KillRest = true
	define(t, s, u)
	st := begin(t, s, "a")
	if err := s.Shutdown(testenv.Context(t), 0); err != nil || alive(st.PID) {
		t.Errorf("shutdown: %v, alive %v", err, alive(st.PID))
	}
}

// shutGate lets nobody in until it is opened.
type shutGate struct{ opened chan struct{} }

func (g shutGate) Enter(ctx context.Context) error {
	select {
	case <-g.opened:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
func (shutGate) Leave() {}

func TestStartsWaitForTheGate(t *testing.T) {
	p := newPlace(t)
	s := p.start()
	gate := shutGate{make(chan struct{})}
	s.p.Gate = gate
	define(t, s, shell("a", stays))
	if err := s.Start("a"); err != nil {
		t.Fatal(err)
	}
	if st, _ := s.Status("a"); st.State != Starting || st.PID != 0 {
		t.Errorf("before the gate: %+v", st)
	}
	close(gate.opened)
	ready(t, s, "a")
	stop(t, s, "a", 0)
}
