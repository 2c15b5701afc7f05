package jail

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/testenv"
)

const testUID = 64999

func newTest(t *testing.T) *Jail {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	j, err := New(Params{Parent: fmt.Sprintf("hutch-test-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Errorf("a cgroup is left: %v", err)
		}
	})
	return j
}

func shell(t *testing.T, script string) Cell {
	return Cell{
		Name: "cell", UID: testUID, MemoryMB: 64, PIDs: 20, OpenFiles: 100, CPUs: 2,
		Program: proc.Params{Path: "/bin/sh", Args: []string{"-c", script}, Log: filepath.Join(t.TempDir(), "log")},
	}
}

// run starts the cell, waits for its end and returns its words.
func run(t *testing.T, j *Jail, c Cell) (string, Report) {
	t.Helper()
	p, report, err := j.Start(testenv.Context(t), c)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	select {
	case <-p.Done():
	case <-testenv.Context(t).Done():
		p.Kill(context.WithoutCancel(t.Context()))
		t.Fatal("out of time")
	}
	if err := j.Remove(testenv.Context(t), c.Name); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(c.Program.Log)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), report
}

// waitReady waits for a line in the program's log.
func waitReady(t *testing.T, c Cell) {
	t.Helper()
	for {
		if b, _ := os.ReadFile(c.Program.Log); strings.Contains(string(b), "ready\n") {
			return
		}
		select {
		case <-testenv.Context(t).Done():
			t.Fatal("the program is not ready in time")
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func TestPrivileges(t *testing.T) {
	j := newTest(t)
	out, report := run(t, j, shell(t, `grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs)' /proc/self/status; umask; env; pwd; readlink /proc/self/fd/0`))
	var got []string
	for l := range strings.Lines(out) {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	uid := fmt.Sprint(testUID)
	want := []string{
		"Uid: " + strings.Join([]string{uid, uid, uid, uid}, " "),
		"Gid: " + strings.Join([]string{uid, uid, uid, uid}, " "),
		"Groups:",
		"CapInh: 0000000000000000", "CapPrm: 0000000000000000", "CapEff: 0000000000000000",
		"CapBnd: 0000000000000000", "CapAmb: 0000000000000000",
		"NoNewPrivs: 1", "0077", "PWD=/", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "/", "/dev/null",
	}
	// The shell adds PWD itself, in any place.
	if diff := cmp.Diff(sorted(want), sorted(got)); diff != "" {
		t.Error(diff)
	}
	t.Logf("report: %+v", report)
	// The thread that was confined must not be one of ours now.
	for _, task := range glob(t, "/proc/self/task/*/status") {
		b, err := os.ReadFile(task)
		if err == nil && strings.Contains(string(b), "NoNewPrivs:\t1") {
			t.Errorf("%s is confined", task)
		}
	}
}

func sorted(s []string) map[string]int {
	m := map[string]int{}
	for _, x := range s {
		m[x]++
	}
	return m
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("glob %s: %v, %v", pattern, names, err)
	}
	return names
}

func TestNamespaces(t *testing.T) {
	j := newTest(t)
	hidden := t.TempDir()
	if err := os.WriteFile(filepath.Join(hidden, "secret"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	c := shell(t, `for n in net mnt ipc uts pid; do readlink /proc/self/ns/$n; done; ls -A `+hidden+`; ls /sys/class/net /nonexistent-dir 2>/dev/null; touch `+hidden+`/x 2>&1`)
	c.Hide = []string{hidden, "/nonexistent-dir"}
	out, _ := run(t, j, c)
	lines := strings.Split(out, "\n")
	for i, n := range []string{"net", "mnt", "ipc", "uts", "pid"} {
		own, err := os.Readlink("/proc/self/ns/" + n)
		if err != nil {
			t.Fatal(err)
		}
		if apart := lines[i] != own; apart != (n != "pid") {
			t.Errorf("%s namespace: child %s, ours %s", n, lines[i], own)
		}
	}
	if strings.Contains(out, "secret") || !strings.Contains(out, "Read-only file system") && !strings.Contains(out, "Permission denied") {
		t.Errorf("hidden directory: %s", out)
	}
	if _, err := os.Stat(filepath.Join(hidden, "secret")); err != nil {
		t.Errorf("hiding reached the host: %v", err)
	}
}

func TestViewIsReadOnly(t *testing.T) {
	j := newTest(t)
	name := fmt.Sprintf("hutch-jail-test-%d", os.Getpid())
	given, err := os.CreateTemp(t.TempDir(), "given")
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()
	c := shell(t, `for d in /tmp /var/tmp /dev/shm /run/lock; do [ -d $d ] || continue; touch $d/`+name+` || echo refused; done
		echo words > /dev/null && echo words >&4 && echo written`)
	c.Program.Files = []*os.File{given}
	out, _ := run(t, j, c)
	for _, d := range []string{"/tmp", "/var/tmp", "/dev/shm", "/run/lock"} {
		if _, err := os.Stat(filepath.Join(d, name)); err == nil {
			t.Errorf("it wrote into %s", d)
			os.Remove(filepath.Join(d, name))
		}
	}
	if !strings.Contains(out, "Read-only file system") || !strings.Contains(out, "refused") || !strings.Contains(out, "written\n") {
		t.Errorf("output: %s", out)
	}
	if b, err := os.ReadFile(given.Name()); err != nil || string(b) != "words\n" {
		t.Errorf("what it was given open holds %q, %v", b, err)
	}
}

func TestDevices(t *testing.T) {
	j := newTest(t)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	dev := filepath.Join(dir, "zero")
	if err := unix.Mknod(dev, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil {
		t.Fatal(err)
	}
	script := "head -c 3 " + dev + " | od -An -c; ls /sys/device"
	c := shell(t, script)
	if out, _ := run(t, j, c); !strings.Contains(out, "Permission denied") {
		t.Errorf("without being given it: %s", out)
	}
	c = shell(t, script)
	c.Devices = []string{dev}
	out, _ := run(t, j, c)
	if strings.Join(strings.Fields(out)[:3], "") != `\0\0\0` || !strings.Contains(out, "No such file") {
		t.Errorf("given it: %s", out)
	}
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil || st.Uid != 0 {
		t.Errorf("the host's node belongs to %d, %v", st.Uid, err)
	}
	for _, bad := range []string{"/etc/passwd", "/nonexistent"} {
		c.Devices = []string{bad}
		if p, _, err := j.Start(t.Context(), c); err == nil {
			p.Kill(t.Context())
			p.Close()
			t.Errorf("%s was given as a device", bad)
		}
	}
}

func TestGivenNetns(t *testing.T) {
	j := newTest(t)
	c := shell(t, `readlink /proc/self/ns/net`)
	c.Netns = "/proc/self/ns/net" // of this thread's, which is the host's
	out, _ := run(t, j, c)
	if own, _ := os.Readlink("/proc/self/ns/net"); strings.TrimSpace(out) != own {
		t.Errorf("child is in %q, want %q", out, own)
	}
	for _, bad := range []string{"/nonexistent", "/dev/null", "/proc/self/ns/uts"} {
		c.Netns = bad
		if p, _, err := j.Start(t.Context(), c); err == nil {
			p.Kill(t.Context())
			p.Close()
			t.Errorf("%s was taken for a network namespace", bad)
		}
	}
}

func TestLimits(t *testing.T) {
	j := newTest(t)
	out, report := run(t, j, shell(t, `cat /proc/self/cgroup
		until grep -q 'open files *100 ' /proc/self/limits; do :; done; cat /proc/self/limits`))
	if diff := cmp.Diff([]string(nil), report.Missing); diff != "" && report.Cgroup != "" {
		t.Error("this host allows limits, but: " + diff)
	}
	if report.Cgroup == "" {
		t.Skip("the host has no cgroups with limits")
	}
	if !strings.Contains(out, fmt.Sprintf("/hutch-test-%d/cell", os.Getpid())) {
		t.Errorf("not in its cgroup:\n%s", out)
	}
	for l := range strings.Lines(out) {
		f := strings.Fields(l)
		if strings.HasPrefix(l, "Max core") && f[4] != "0" || strings.HasPrefix(l, "Max open files") && f[3] != "100" {
			t.Errorf("limit: %s", l)
		}
	}
}

func TestMemoryLimitEndsOnlyTheCell(t *testing.T) {
	j := newTest(t)
	c := shell(t, `echo ready; exec tail /dev/zero`) // tail keeps it all
	c.MemoryMB = 16
	p, report, err := j.Start(testenv.Context(t), c)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, m := range report.Missing {
		if strings.Contains(m, "memory") {
			p.Kill(t.Context())
			j.Remove(t.Context(), c.Name)
			t.Skip("the host cannot limit memory: " + m)
		}
	}
	select {
	case <-p.Done():
	case <-testenv.Context(t).Done():
		p.Kill(context.WithoutCancel(t.Context()))
		t.Fatal("the limit does not bite")
	}
	if p.Exit().Signal != unix.SIGKILL {
		t.Errorf("exit: %v", p.Exit())
	}
	if n := j.OOMKills(c.Name); n != 1 {
		t.Errorf("%d kills for want of memory, want 1", n)
	}
	if err := j.Remove(testenv.Context(t), c.Name); err != nil {
		t.Error(err)
	}
	if n := j.OOMKills(c.Name); n != 0 {
		t.Errorf("%d kills in a cgroup that is gone", n)
	}
}

func TestFailedStartLeavesNothing(t *testing.T) {
	j := newTest(t)
	good := shell(t, "exit 0")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := map[string]struct {
		ctx    context.Context
		change func(*Cell)
	}{
		"missing program": {t.Context(), func(c *Cell) { c.Program.Path = "/nonexistent" }},
		"root":            {t.Context(), func(c *Cell) { c.UID = 0 }},
		"bad name":        {t.Context(), func(c *Cell) { c.Name = "../x" }},
		"missing netns":   {t.Context(), func(c *Cell) { c.Netns = "/nonexistent" }},
		"hide a file":     {t.Context(), func(c *Cell) { c.Hide = []string{"/etc/passwd"} }},
		"cancelled":       {cancelled, func(*Cell) {}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := good
			tt.change(&c)
			if p, _, err := j.Start(tt.ctx, c); err == nil {
				p.Kill(t.Context())
				p.Close()
				t.Fatal("it was started")
			}
			for _, parent := range j.groups.parents {
				if _, err := os.Stat(filepath.Join(parent, "cell")); err == nil {
					t.Errorf("%s has a cgroup left", parent)
				}
			}
		})
	}
	if _, err := New(Params{Parent: "a/b"}); err == nil {
		t.Error("a path was taken for a name")
	}
}

func TestReclaim(t *testing.T) {
	j := newTest(t)
	start := func(name string) (*proc.Process, Cell) {
		c := shell(t, "sleep 1000 & sleep 1000 & echo ready; wait")
		c.Name = name
		p, _, err := j.Start(testenv.Context(t), c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		waitReady(t, c)
		return p, c
	}
	kept, c := start("kept")
	lost, _ := start("lost")
	if _, _, err := j.Start(t.Context(), c); err == nil {
		t.Error("two programs share a cell")
	}
	gone, err := j.Reclaim(testenv.Context(t), func(name string) bool { return name == "kept" })
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"lost"}, gone); diff != "" && j.groups.version != "" {
		t.Error(diff)
	}
	select {
	case <-lost.Done():
	case <-testenv.Context(t).Done():
		t.Error("the unclaimed program lives")
	}
	if _, err := proc.Identify(kept.ID().PID); err != nil {
		t.Errorf("the claimed program: %v", err)
	}
	if _, err := j.Reclaim(testenv.Context(t), func(string) bool { return false }); err != nil {
		t.Error(err)
	}
	<-kept.Done()
	for range 2 {
		if err := j.Remove(t.Context(), "kept"); err != nil {
			t.Error(err)
		}
	}
}

// TestV2Birth tests that a child is born in its cgroup v2, on any host with a
// v2 tree, with or without controllers in it.
func TestV2Birth(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	point := ""
	for l := range strings.Lines(string(mounts)) {
		if strings.Contains(l, " - cgroup2 ") {
			point = strings.Fields(l)[4]
		}
	}
	if point == "" {
		t.Skip("the host has no cgroup v2 tree")
	}
	j, err := newJail(Params{Parent: fmt.Sprintf("hutch-v2-%d", os.Getpid())}, hierarchies{v2: point})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}()
	out, report := run(t, j, shell(t, "cat /proc/self/cgroup"))
	if !strings.Contains(out, fmt.Sprintf("0::/hutch-v2-%d/cell\n", os.Getpid())) {
		t.Errorf("not in its cgroup:\n%s", out)
	}
	t.Logf("%+v", report)
}

func TestFindHierarchies(t *testing.T) {
	v2 := t.TempDir()
	line := func(root, point, kind, options string) string {
		return "30 1 0:26 " + root + " " + point + " rw,relatime shared:9 - " + kind + " cgroup " + options + "\n"
	}
	hybrid := line("/", "/c/cpu", "cgroup", "rw,cpu,cpuacct") + line("/", "/c/memory", "cgroup", "rw,memory") +
		line("/", "/c/systemd", "cgroup", "rw,xattr,name=systemd") + line("/", v2, "cgroup2", "rw") +
		line("/a/container", "/other", "cgroup", "rw,pids")
	want := map[string]string{"cpu": "/c/cpu", "memory": "/c/memory"}
	if got := findHierarchies(hybrid); got.v2 != "" || cmp.Diff(want, got.v1) != "" {
		t.Errorf("hybrid: %+v", got)
	}
	if err := os.WriteFile(filepath.Join(v2, "cgroup.controllers"), []byte("cpuset cpu io memory pids\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := findHierarchies(hybrid); got.v2 != v2 {
		t.Errorf("with controllers in v2: %+v", got)
	}
	for _, odd := range []string{"", "\n", "a - b\n", "1 2 3 / /x - cgroup\n"} {
		if got := findHierarchies(odd); got.v2 != "" || len(got.v1) != 0 {
			t.Errorf("%q: %+v", odd, got)
		}
	}
}

func TestThreadsAreThrownAway(t *testing.T) {
	testenv.RequireRoot(t)
	seen := map[int]bool{}
	for range 50 {
		err := onOwnThread(func() error {
			tid := unix.Gettid()
			if tid == unix.Getpid() {
				return fmt.Errorf("on the main thread")
			}
			var s unix.Stat_t
			if seen[tid] {
				return fmt.Errorf("thread %d came again", tid)
			}
			seen[tid] = true
			return unix.Stat("/", &s)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
