package runtime

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/supervise"
	"github.com/hutch-run/hutch/internal/testenv"
)

// guest is a guest's files, with programs that play the daemons.
type guest struct {
	t       *testing.T
	root    string
	bin     string
	cgroups string
}

func newGuest(t *testing.T) guest {
	t.Helper()
	// Not t.TempDir: names of sockets are short.
	root, err := os.MkdirTemp("", "rt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	top := testenv.Cgroup(t)
	g := guest{t, root, filepath.Join(root, "bin"), filepath.Join(top, "services")}
	t.Cleanup(g.sweep)
	testenv.CheckGoroutines(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"bin", "run/containerd", "var", "usr/lib/cni"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../run", filepath.Join(root, "var/run")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"containerd", "dockerd", "runc", "containerd-shim-runc-v2", "iptables"} {
		if err := os.Symlink(self, filepath.Join(g.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// sweep kills all that a test left.
func (g guest) sweep() {
	for _, dir := range []string{"dockerd", "containerd", ""} {
		dir = filepath.Join(g.cgroups, dir)
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
			if err := unix.Rmdir(dir); err == nil || err == unix.ENOENT {
				break
			}
		}
	}
}

// server returns the runtime of one life of the agent's server.
func (g guest) server() (*Runtime, *supervise.Supervisor) {
	log := slog.New(slog.DiscardHandler)
	s := supervise.New(supervise.Params{Cgroups: g.cgroups, Dir: filepath.Join(g.root, "run/hutch/services"), Log: log})
	g.t.Cleanup(s.Close)
	r := New(Params{
		Supervisor: s, Log: log, root: g.root, path: g.bin, kernel: func(context.Context) error { return nil },
		Env: func() map[string]string { return map[string]string{"https_proxy": "http://p", "OTHER": "x"} },
	})
	return r, s
}

func (g guest) file(name, content string) {
	g.t.Helper()
	path := filepath.Join(g.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		g.t.Fatal(err)
	}
}

// lines returns what daemons marked in a file of /run.
func (g guest) lines(file string) []string {
	var all []string
	for _, dir := range []string{"run/containerd", "run"} {
		b, _ := os.ReadFile(filepath.Join(g.root, dir, file))
		all = append(all, strings.Fields(strings.ReplaceAll(string(b), " ", "_"))...)
	}
	return all
}

// until calls Ensure until ok says so, and returns all the different statuses.
func until(t *testing.T, r *Runtime, ok func(Ensured) bool) (Ensured, map[string]bool) {
	t.Helper()
	seen := map[string]bool{}
	tick := time.NewTicker(2 * time.Millisecond) // who calls is not told
	defer tick.Stop()
	for ctx := testenv.Context(t); ; <-tick.C {
		e := r.Ensure(ctx, true)
		seen[e.Status] = true
		if ok(e) {
			return e, seen
		}
		if ctx.Err() != nil {
			t.Fatalf("it stays %+v", e)
		}
	}
}

func isReady(e Ensured) bool { return e.Ready }

func pid(t *testing.T, s *supervise.Supervisor, name string) int {
	t.Helper()
	st, _ := s.Status(name)
	return st.PID
}

// TestOneStartForAll is case 3 of the acceptance list.
func TestOneStartForAll(t *testing.T) {
	g := newGuest(t)
	r, s := g.server()
	var mu sync.Mutex
	count := map[string]int{}
	var callers sync.WaitGroup
	ctx := testenv.Context(t)
	for range 50 {
		callers.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for ; ctx.Err() == nil; <-tick.C {
				e := r.Ensure(ctx, true)
				mu.Lock()
				count[e.Status]++
				mu.Unlock()
				if e.Ready != (e.Status == StatusStarted || e.Status == StatusReused) || e.Ready != (e.Endpoint == Endpoint) {
					t.Errorf("a contradiction: %+v", e)
				}
				if e.Ready {
					return
				}
			}
		})
	}
	callers.Wait()
	if count[StatusStarted] != 1 || count[StatusReused] != 49 || count[StatusStarting] == 0 || len(count) != 3 {
		t.Errorf("statuses %v", count)
	}
	if diff := cmp.Diff([]string{"containerd", "dockerd"}, g.lines("starts")); diff != "" {
		t.Errorf("daemons started (-want +got):\n%s", diff)
	}
	rep := r.Status(ctx)
	if !rep.Containerd || !rep.Docker || rep.Detail != "docker socket ready" {
		t.Errorf("report %+v", rep)
	}
	want := []Service{
		{Name: "containerd", Status: "ready", Detail: "socket reachable: " + g.root + ContainerdSocket},
		{Name: "dockerd", Status: "ready", Detail: "API /_ping OK: " + g.root + DockerSocket + "; Docker 1.2, played, 2 containers, 1 running"},
		{Name: "runc", Status: "ready", Detail: "found: " + g.bin + "/runc"},
	}
	if diff := cmp.Diff(want, rep.Services); diff != "" {
		t.Errorf("services (-want +got):\n%s", diff)
	}
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid(t, s, Dockerd)) + "/environ")
	if err != nil || !strings.Contains(string(env), "https_proxy=http://p\x00") || strings.Contains(string(env), "OTHER") {
		t.Errorf("environment %q, %v", env, err)
	}
}

// TestTheDeadAreNotReused is case 4: dockerd is killed again and again.
func TestTheDeadAreNotReused(t *testing.T) {
	g := newGuest(t)
	r, s := g.server()
	until(t, r, isReady)
	for n := range 2 {
		old := pid(t, s, Dockerd)
		if err := unix.Kill(old, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// A killed process is gone when it can be waited for; only then it is dead.
		for st, changed := s.Status(Dockerd); st.PID == old; st, changed = s.Status(Dockerd) {
			select {
			case <-changed:
			case <-testenv.Context(t).Done():
				t.Fatal("nobody sees the end")
			}
		}
		if e := r.Ensure(t.Context(), true); e.Ready && pid(t, s, Dockerd) == old {
			t.Errorf("a dead dockerd is %+v", e)
		}
		e, _ := until(t, r, isReady)
		if e.Status != StatusReused {
			t.Errorf("afterwards %+v", e)
		}
		if rep := r.Status(t.Context()); rep.Services[1].Crashes != uint32(n+1) || !strings.Contains(rep.Services[1].Detail, "killed by signal SIGKILL") {
			t.Errorf("after %d crashes: %+v", n+1, rep.Services[1])
		}
	}
	if got := len(g.lines("starts")); got != 4 {
		t.Errorf("%d starts: %v", got, g.lines("starts"))
	}
}

// TestDockerdConnectsAgain: a dockerd that answers and has not found its
// containerd again is not ready.
func TestDockerdConnectsAgain(t *testing.T) {
	g := newGuest(t)
	r, s := g.server()
	until(t, r, isReady)
	g.file("run/lost", "")
	old := pid(t, s, Containerd)
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for ctx := testenv.Context(t); ; {
		if rep := r.Status(ctx); rep.Containerd && pid(t, s, Containerd) != old {
			if rep.Docker || !strings.Contains(rep.Services[1].Detail, "lost containerd") {
				t.Errorf("dockerd is %+v", rep.Services[1])
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal("containerd does not come back")
		}
	}
	if e := r.Ensure(t.Context(), true); e.Ready || e.Status != StatusStarting || !strings.Contains(e.Message, "lost containerd") {
		t.Errorf("meanwhile %+v", e)
	}
	if err := os.Remove(filepath.Join(g.root, "run/lost")); err != nil {
		t.Fatal(err)
	}
	if e, _ := until(t, r, isReady); e.Status != StatusReused {
		t.Errorf("then %+v", e)
	}
}

// TestACrashLoopIsTold is case 5: containerd dies, and its program is broken.
func TestACrashLoopIsTold(t *testing.T) {
	g := newGuest(t)
	r, s := g.server()
	until(t, r, isReady)
	docker := pid(t, s, Dockerd)
	if err := os.Remove(filepath.Join(g.bin, "containerd")); err != nil {
		t.Fatal(err)
	}
	g.file("bin/containerd", "#!/bin/sh\necho first >&2; echo no disk >&2; exit 7\n")
	if err := unix.Kill(pid(t, s, Containerd), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var sv Service
	for ctx := testenv.Context(t); sv.Status != supervise.WordError || sv.Crashes < 2; sv = r.Status(ctx).Services[0] {
		if ctx.Err() != nil {
			t.Fatalf("containerd stays %+v", sv)
		}
	}
	if !strings.Contains(sv.Detail, "exit status 7: no disk") || !strings.Contains(sv.Detail, "next start in") {
		t.Errorf("detail %q", sv.Detail)
	}
	if pid(t, s, Dockerd) != docker {
		t.Error("dockerd went with containerd")
	}
}

// TestASocketIsNoAnswer is case 6.
func TestASocketIsNoAnswer(t *testing.T) {
	g := newGuest(t)
	g.file("run/mute", "")
	r, s := g.server()
	if e := r.Ensure(t.Context(), true); e.Ready || e.Status != StatusStarting {
		t.Errorf("a start says %+v", e)
	}
	want := "socket connectable, API initializing: " + g.root + DockerSocket
	ctx := testenv.Context(t)
	for {
		sv := r.Status(ctx).Services[1]
		if sv.Status == supervise.WordReady || ctx.Err() != nil {
			t.Fatalf("dockerd is %+v", sv)
		}
		if strings.HasPrefix(sv.Detail, want) && sv.Status == supervise.WordNotReady {
			break
		}
	}
	if e := r.Ensure(ctx, true); e.Status != StatusStarting {
		t.Errorf("meanwhile %+v", e)
	}
	if e := r.Ensure(ctx, false); e.Ready || e.Status != StatusStarting {
		t.Errorf("who only looks sees %+v", e)
	}
	if err := os.Remove(filepath.Join(g.root, "run/mute")); err != nil {
		t.Fatal(err)
	}
	if e, _ := until(t, r, isReady); e.Status != StatusStarted {
		t.Errorf("then %+v", e)
	}
	// One that falls silent later does not count as ready, and is not killed.
	was := pid(t, s, Dockerd)
	g.file("run/mute", "")
	r.checkedOf = daemons{}
	for _, want := range []string{StatusStarting, StatusFailed} {
		if e := r.Ensure(ctx, true); e.Ready || e.Status != want || !strings.Contains(e.Message, "does not answer") {
			t.Errorf("a silent dockerd is %+v, want %s", e, want)
		}
		r.p.patient = time.Millisecond
	}
	if err := os.Remove(filepath.Join(g.root, "run/mute")); err != nil {
		t.Fatal(err)
	}
	until(t, r, isReady)
	if pid(t, s, Dockerd) != was {
		t.Error("a silent dockerd was started again")
	}
}

// TestLookingStartsNothing is case 7.
func TestLookingStartsNothing(t *testing.T) {
	g := newGuest(t)
	r, _ := g.server()
	e := r.Ensure(t.Context(), false)
	if e.Ready || e.Status != StatusFailed || e.Message != "dockerd does not run: docker socket missing: "+g.root+DockerSocket {
		t.Errorf("a cold guest is %+v", e)
	}
	rep := r.Status(t.Context())
	if rep.Docker || rep.Services[1].Detail != "socket missing: "+g.root+DockerSocket || rep.Services[0].Status != supervise.WordNotReady {
		t.Errorf("report %+v", rep)
	}
	for _, name := range []string{"runc", "dockerd"} {
		if err := os.Remove(filepath.Join(g.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	want := "missing runtime binaries under " + g.bin + ": runc, dockerd"
	for _, start := range []bool{false, true} {
		if e := r.Ensure(t.Context(), start); e.Ready || e.Status != StatusFailed || e.Message != want {
			t.Errorf("start %v without programs: %+v", start, e)
		}
	}
	rep = r.Status(t.Context())
	if !strings.HasSuffix(rep.Detail, want) || rep.Services[2].Status != supervise.WordError {
		t.Errorf("report %+v", rep)
	}
	if got := g.lines("starts"); len(got) != 0 {
		t.Errorf("started: %v", got)
	}
}

// TestAnothersDockerdIsReused finds one that somebody started by hand.
func TestAnothersDockerdIsReused(t *testing.T) {
	g := newGuest(t)
	r, _ := g.server()
	g.file("containerd.sock", "")
	config, err := json.Marshal(map[string]any{"hosts": []string{"unix://" + g.root + DockerSocket}, "containerd": g.root + "/containerd.sock"})
	if err != nil {
		t.Fatal(err)
	}
	g.file("own.json", string(config))
	cmd := exec.CommandContext(testenv.Context(t), filepath.Join(g.bin, "dockerd"), "--config-file", filepath.Join(g.root, "own.json"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	for ctx := testenv.Context(t); ; {
		if e := r.Ensure(ctx, false); e.Ready {
			if e.Status != StatusReused {
				t.Errorf("it is %+v", e)
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal("it is not found")
		}
	}
}

// TestTheNextServerFindsTheRuntime is case 22 as far as it is the runtime's.
func TestTheNextServerFindsTheRuntime(t *testing.T) {
	g := newGuest(t)
	r, s := g.server()
	if r.Left() {
		t.Error("a first server finds something")
	}
	until(t, r, isReady)
	was := []int{pid(t, s, Containerd), pid(t, s, Dockerd)}
	s.Close()
	next, ns := g.server()
	started := 0
	next.p.Started = func() { started++ }
	if !next.Left() {
		t.Error("nothing is left")
	}
	if err := next.Define(); err != nil {
		t.Fatal(err)
	}
	e, seen := until(t, next, isReady)
	if seen[StatusFailed] || e.Status != StatusReused || started != 1 {
		t.Errorf("the next server sees %v, told %d times", seen, started)
	}
	if diff := cmp.Diff(was, []int{pid(t, ns, Containerd), pid(t, ns, Dockerd)}); diff != "" {
		t.Errorf("processes (-before +after):\n%s", diff)
	}
}

// TestContainersEndWithTheMachine: dockerd is told to end its containers, and
// is stopped before containerd.
func TestContainersEndWithTheMachine(t *testing.T) {
	g := newGuest(t)
	r, s := g.server()
	until(t, r, isReady)
	if err := s.Shutdown(testenv.Context(t), 20*time.Second); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"live-restore_false,_true"}, g.lines("ends")); diff != "" {
		t.Errorf("the end (-want +got):\n%s", diff)
	}
	if e := r.Ensure(t.Context(), true); e.Ready || e.Status != StatusFailed || !strings.Contains(e.Message, "shutting down") {
		t.Errorf("afterwards %+v", e)
	}
}
