package quiesce

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// world is a guest: its cgroups, and what was done to its disk.
type world struct {
	root  string
	away  atomic.Bool
	looks atomic.Int32 // for the host
	note  string
	sync  func() error // nil: the disk is written back at once
}

func (w *world) params() Params {
	return Params{
		Cgroups: w.root, Spare: "agent", Note: w.note, Log: slog.New(slog.DiscardHandler),
		Away: func() bool { w.looks.Add(1); return w.away.Load() },
		Sync: func() error {
			if w.sync != nil {
				return w.sync()
			}
			return nil
		},
	}
}

// plain returns a world of ordinary files, in which a group stands still as
// soon as its cgroup.events say so.
func plain(t *testing.T, groups ...string) *world {
	t.Helper()
	testenv.CheckGoroutines(t)
	w := &world{root: t.TempDir(), note: filepath.Join(t.TempDir(), "run/note")}
	for _, g := range groups {
		w.make(t, g)
	}
	return w
}

func (w *world) make(t testing.TB, group string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(w.root, group), 0o755); err != nil {
		t.Error(err)
	}
	w.set(t, group, "cgroup.freeze", "0\n")
	w.set(t, group, "cgroup.events", "populated 0\nfrozen 1\n")
}

func (w *world) set(t testing.TB, group, file, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.root, group, file), []byte(text), 0o644); err != nil {
		t.Error(err)
	}
}

// frozen tells what every group was told to be, as it looks from outside.
func (w *world) frozen(t testing.TB) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	files, err := filepath.Glob(filepath.Join(w.root, "*/cgroup.freeze"))
	if err != nil {
		t.Error(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Error(err)
		}
		found[filepath.Base(filepath.Dir(f))] = strings.TrimSpace(string(b)) == "1"
	}
	return found
}

func (w *world) wantFrozen(t testing.TB, want map[string]bool) {
	t.Helper()
	if diff := cmp.Diff(want, w.frozen(t)); diff != "" {
		t.Errorf("frozen (-want +got):\n%s", diff)
	}
}

func (w *world) noted() bool {
	_, err := os.Stat(w.note)
	return err == nil
}

// start returns a Quiet that the test's end closes.
func start(t *testing.T, p Params) *Quiet {
	t.Helper()
	q := New(p)
	t.Cleanup(q.Close)
	return q
}

func quiesce(t testing.TB, q *Quiet) Report {
	t.Helper()
	r, err := q.Quiesce(testenv.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func wake(t testing.TB, q *Quiet, copied bool) {
	t.Helper()
	if err := q.Wake(testenv.Context(t), copied, func(bool) error { return nil }); err != nil {
		t.Error(err)
	}
}

// awake waits until the guest is no longer still.
func awake(t testing.TB, q *Quiet) {
	t.Helper()
	if err := q.Enter(testenv.Context(t)); err != nil {
		t.Fatalf("the guest stays still: %v", err)
	}
	q.Leave()
}

func TestTheDiskIsWrittenBackBeforeAndAfter(t *testing.T) {
	w := plain(t, "agent", "hutch", "docker")
	var seen []bool
	w.sync = func() error {
		seen = append(seen, w.frozen(t)["hutch"])
		return nil
	}
	q := start(t, w.params())
	r := quiesce(t, q)
	if diff := cmp.Diff([]bool{false, true}, seen); diff != "" {
		t.Errorf("programs were frozen at the writes (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"docker", "hutch"}, r.Frozen); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
	w.wantFrozen(t, map[string]bool{"agent": false, "hutch": true, "docker": true})
	if !q.Still() || !w.noted() {
		t.Errorf("still %v, noted %v", q.Still(), w.noted())
	}
	again := quiesce(t, q)
	if diff := cmp.Diff(r.Frozen, again.Frozen); diff != "" || len(seen) != 4 {
		t.Errorf("a second time %d writes, frozen (-first +second):\n%s", len(seen), diff)
	}
	wake(t, q, false)
	w.wantFrozen(t, map[string]bool{"agent": false, "hutch": false, "docker": false})
	if q.Still() || w.noted() {
		t.Errorf("afterwards still %v, noted %v", q.Still(), w.noted())
	}
}

func TestWhatOthersFrozeStaysFrozen(t *testing.T) {
	w := plain(t, "hutch", "paused")
	w.set(t, "paused", "cgroup.freeze", "1\n")
	w.set(t, "paused", "cgroup.events", "populated 1\nfrozen 0\n") // and nobody waits for it
	q := start(t, w.params())
	quiesce(t, q)
	wake(t, q, false)
	w.wantFrozen(t, map[string]bool{"hutch": false, "paused": true})
}

func TestGroupsThatComeUpMeanwhile(t *testing.T) {
	w := plain(t, "hutch")
	w.set(t, "hutch", "cgroup.events", "populated 1\nfrozen 0\n")
	q := start(t, w.params())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !w.frozen(t)["hutch"] && t.Context().Err() == nil {
		}
		w.make(t, "late")
		w.set(t, "hutch", "cgroup.events", "populated 1\nfrozen 1\n")
	}()
	r := quiesce(t, q)
	<-done
	if diff := cmp.Diff([]string{"hutch", "late"}, r.Frozen); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
}

// TestFailuresUndoThemselves breaks each step.
func TestFailuresUndoThemselves(t *testing.T) {
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		spoil func(w *world, p *Params)
		want  error // nil: Unavailable
	}{
		"first write": {func(w *world, _ *Params) { w.sync = func() error { return broken } }, broken},
		"second write": {func(w *world, _ *Params) {
			w.sync = func() error {
				if w.frozen(t)["hutch"] {
					return broken
				}
				return nil
			}
		}, broken},
		"restless": {func(w *world, p *Params) {
			w.set(t, "hutch", "cgroup.events", "populated 1\nfrozen 0\n")
			p.freezeLimit = 10 * time.Millisecond
		}, nil},
	} {
		w := plain(t, "hutch", "agent")
		p := w.params()
		tc.spoil(w, &p)
		q := start(t, p)
		_, err := q.Quiesce(testenv.Context(t))
		if (tc.want != nil && !errors.Is(err, tc.want)) || (tc.want == nil && !fault.Is(err, fault.Unavailable)) {
			t.Errorf("%s: error = %v", name, err)
		}
		for group, frozen := range w.frozen(t) {
			if frozen {
				t.Errorf("%s: %s stays frozen", name, group)
			}
		}
		if q.Still() || w.noted() {
			t.Errorf("%s: still %v, noted %v", name, q.Still(), w.noted())
		}
	}
}

func TestGroupsThatComeUpForEver(t *testing.T) {
	w := plain(t, "hutch")
	n := 0
	f := freezer{root: w.root, spare: "agent", limit: time.Minute, note: func([]string) error {
		n++
		w.make(t, strings.Repeat("x", n))
		return nil
	}}
	if err := f.freeze(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("error = %v", err)
	}
}

// TestAHostThatGivesUp ends the call in its longest step.
func TestAHostThatGivesUp(t *testing.T) {
	w := plain(t, "hutch")
	w.set(t, "hutch", "cgroup.events", "populated 1\nfrozen 0\n")
	q := start(t, w.params())
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for !w.frozen(t)["hutch"] && t.Context().Err() == nil {
		}
		cancel()
	}()
	if _, err := q.Quiesce(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	w.wantFrozen(t, map[string]bool{"hutch": false})
	awake(t, q)
}

func TestAFailedConfigureLeavesTheGuestStill(t *testing.T) {
	w := plain(t, "hutch")
	q := start(t, w.params())
	broken := errors.New("broken")
	var was []bool
	configure := func(err error) func(bool) error {
		return func(still bool) error {
			was = append(was, still && w.frozen(t)["hutch"])
			return err
		}
	}
	ctx := testenv.Context(t)
	for _, step := range []struct {
		err   error
		still bool
	}{{broken, true}, {broken, true}, {nil, false}, {nil, false}} {
		if len(was) == 0 {
			quiesce(t, q)
		}
		if err := q.Wake(ctx, true, configure(step.err)); !errors.Is(err, step.err) {
			t.Errorf("error = %v, want %v", err, step.err)
		}
		if q.Still() != step.still || w.frozen(t)["hutch"] != step.still {
			t.Errorf("after %v: still %v, frozen %v", step.err, q.Still(), w.frozen(t))
		}
	}
	if diff := cmp.Diff([]bool{true, true, true, false}, was); diff != "" {
		t.Errorf("configure was told (-want +got):\n%s", diff)
	}
}

func TestStartsWait(t *testing.T) {
	for _, copied := range []bool{false, true} {
		w := plain(t, "hutch")
		q := start(t, w.params())
		ctx := testenv.Context(t)
		if err := q.Enter(ctx); err != nil {
			t.Fatal(err)
		}
		quiet := make(chan error, 1)
		go func() {
			_, err := q.Quiesce(ctx)
			quiet <- err
		}()
		for !q.Still() && ctx.Err() == nil {
		}
		w.wantFrozen(t, map[string]bool{"hutch": false}) // a start is under way
		q.Leave()
		if err := <-quiet; err != nil {
			t.Fatal(err)
		}
		gone, cancel := context.WithCancel(ctx)
		cancel()
		if err := q.Enter(gone); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that went away got %v", err)
		}
		waiting := make(chan error, 1)
		go func() { waiting <- q.Enter(ctx) }()
		select {
		case err := <-waiting:
			t.Fatalf("a start in a still guest: %v", err)
		default:
		}
		// It may wait only after this: it is let in then, in a copy too.
		wake(t, q, copied)
		switch err := <-waiting; {
		case err == nil:
			q.Leave()
		case !copied || !fault.Is(err, fault.Unavailable):
			t.Errorf("copy %v: a start that waited got %v", copied, err)
		}
		awake(t, q)
	}
}

// TestACopyTurnsAwayWhoWaits asks the gate itself, where it is known that
// somebody waits.
func TestACopyTurnsAwayWhoWaits(t *testing.T) {
	var g gate
	g.close()
	s := g.enter()
	g.open(true)
	<-s.opened
	if !s.refuse || g.enter() != nil {
		t.Error("who waited is let in, or who came later is not")
	}
	g.Leave()
}

func TestTheNextServerFindsItselfStill(t *testing.T) {
	w := plain(t, "hutch", "odd\nname")
	first := New(w.params())
	if err := first.Recover(); err != nil || first.Still() {
		t.Fatalf("without a note: %v, still %v", err, first.Still())
	}
	quiesce(t, first)
	first.Close() // a crash, but for the goroutine

	next := start(t, w.params())
	if err := next.Recover(); err != nil || !next.Still() {
		t.Fatalf("recover: %v, still %v", err, next.Still())
	}
	if r := quiesce(t, next); len(r.Frozen) != 2 {
		t.Errorf("frozen: %q", r.Frozen)
	}
	wake(t, next, true)
	w.wantFrozen(t, map[string]bool{"hutch": false, "odd\nname": false})
}

func TestAGuestWithoutHostWakes(t *testing.T) {
	w := plain(t, "hutch")
	p := w.params()
	p.lookEvery, p.lonely, p.patience = time.Millisecond, 20*time.Millisecond, time.Hour
	q := start(t, p)
	quiesce(t, q)
	for w.looks.Load() < 40 && t.Context().Err() == nil { // twice the time that it stays without a host
	}
	if !q.Still() {
		t.Error("a guest woke while its host was there")
	}
	w.away.Store(true)
	awake(t, q)
	w.wantFrozen(t, map[string]bool{"hutch": false})
	if w.noted() {
		t.Error("the note is left")
	}
}

func TestPatienceEnds(t *testing.T) {
	w := plain(t, "hutch")
	p := w.params()
	p.lookEvery, p.patience = time.Millisecond, 20*time.Millisecond
	q := start(t, p)
	quiesce(t, q)
	awake(t, q)
	w.wantFrozen(t, map[string]bool{"hutch": false})
}

// echo is a program in a cgroup that answers every line.
type echo struct {
	in  *os.File
	out *bufio.Reader
	r   *os.File
}

func startEcho(t *testing.T, group string) *echo {
	t.Helper()
	if err := os.MkdirAll(group, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "while read x; do echo $x; done")
	cmd.Stdin, cmd.Stdout = inR, outW
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = inR.Close(), outW.Close()
	t.Cleanup(func() {
		_, _ = inW.Close(), outR.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for dir := group; strings.Contains(filepath.Base(filepath.Dir(dir)), "hutch-test") || dir == group; dir = filepath.Dir(dir) {
			if err := unix.Rmdir(dir); err != nil {
				t.Errorf("remove %s: %v", dir, err)
			}
		}
	})
	return &echo{in: inW, out: bufio.NewReader(outR), r: outR}
}

func (e *echo) tell(t *testing.T) {
	t.Helper()
	if _, err := e.in.WriteString("x\n"); err != nil {
		t.Error(err)
	}
}

func (e *echo) answer(t *testing.T) {
	t.Helper()
	_ = e.r.SetReadDeadline(time.Now().Add(20 * time.Second))
	if line, err := e.out.ReadString('\n'); err != nil || line != "x\n" {
		t.Errorf("answer %q, %v", line, err)
	}
}

// TestRealPrograms freezes programs in groups of several depths; the agent's
// goes on.
func TestRealPrograms(t *testing.T) {
	w := &world{root: testenv.Cgroup(t), note: filepath.Join(t.TempDir(), "note")}
	testenv.CheckGoroutines(t)
	frozen := []*echo{startEcho(t, w.root+"/hutch/p1"), startEcho(t, w.root+"/docker")}
	spare := startEcho(t, w.root+"/agent")
	for range 20 {
		q := New(w.params())
		quiesce(t, q)
		for _, e := range append(frozen, spare) {
			e.tell(t)
		}
		spare.answer(t)
		for _, g := range []string{"hutch", "hutch/p1", "docker"} {
			b, err := os.ReadFile(filepath.Join(w.root, g, "cgroup.events"))
			if err != nil || !strings.Contains(string(b), "frozen 1") {
				t.Errorf("%s: %q, %v", g, b, err)
			}
		}
		if err := frozen[0].r.SetReadDeadline(time.Now()); err != nil {
			t.Error(err)
		}
		if line, err := frozen[0].out.ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a frozen program answered %q, %v", line, err)
		}
		wake(t, q, true)
		for _, e := range frozen {
			e.answer(t)
		}
		q.Close()
	}
}

func TestSyncDisk(t *testing.T) {
	testenv.RequireRoot(t)
	if err := SyncDisk(testenv.SmallDisk(t, "64k"))(); err != nil {
		t.Error(err)
	}
	if err := SyncDisk(filepath.Join(t.TempDir(), "none"))(); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no disk: %v", err)
	}
}
