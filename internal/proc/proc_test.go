package proc_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// The test binary is also the child, and the parent that dies, when this is
// set in its environment.
const roleEnv = "HUTCH_PROC_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "":
		os.Exit(m.Run())
	case "exit7":
		fmt.Fprintln(os.Stderr, "first line\nsecond \x1b[31mline\n\ncannot open disk")
		os.Exit(7)
	case "wait":
		fmt.Fprintln(os.Stdout, "waiting")
		select {}
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		tell("ready")
		select {}
	case "polite":
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		tell("ready")
		<-c
		fmt.Fprintln(os.Stdout, "bye")
		os.Exit(3)
	case "flood":
		flood()
	case "talk":
		talk()
	case "parent":
		parent()
	}
}

func tell(s string) { fmt.Fprintln(os.NewFile(proc.FirstFD, "to test"), s) }

// flood writes far more than a pipe holds, then says so.
func flood() {
	in := bufio.NewReader(os.NewFile(proc.FirstFD+1, "from test"))
	in.ReadString('\n')
	line := strings.Repeat("x", 999) + "\n"
	for range 2000 {
		syscall.Write(1, []byte(line)) // EAGAIN is what the test is about
	}
	tell("flooded")
	in.ReadString('\n')
	syscall.Write(1, []byte("after the flood\n"))
	tell("spoken")
	select {}
}

// talk writes a line for every one it reads.
func talk() {
	in := bufio.NewReader(os.NewFile(proc.FirstFD+1, "from test"))
	for {
		s, err := in.ReadString('\n')
		if err != nil {
			select {} // the one who asked is gone: stay
		}
		fmt.Fprint(os.Stdout, "said ", s)
		tell("ok")
	}
}

// parent starts a child, tells who it is, and waits to be killed.
func parent() {
	p, err := proc.Start(context.Background(), proc.Params{
		Path: "/proc/self/exe", Env: []string{roleEnv + "=talk"}, Log: os.Args[1],
		Files: []*os.File{os.NewFile(3, "to test"), os.NewFile(4, "from test")},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(p.ID())
	select {}
}

// child is a started role with a line each way.
type child struct {
	*proc.Process
	from *bufio.Reader
	to   *os.File
	log  string
}

func start(t *testing.T, role string) child {
	t.Helper()
	testenv.CheckGoroutines(t)
	c := child{log: filepath.Join(t.TempDir(), "log")}
	outR, outW := pipe(t)
	inR, inW := pipe(t)
	p, err := proc.Start(testenv.Context(t), proc.Params{
		Path: "/proc/self/exe", Env: []string{roleEnv + "=" + role},
		Files: []*os.File{outW, inR}, Log: c.log,
	})
	outW.Close()
	inR.Close()
	if err != nil {
		t.Fatal(err)
	}
	c.Process, c.from, c.to = p, bufio.NewReader(outR), inW
	t.Cleanup(func() { end(t, p) })
	return c
}

func end(t *testing.T, p *proc.Process) {
	p.Kill(context.WithoutCancel(t.Context()))
	p.Close()
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func (c child) expect(t *testing.T, want string) {
	t.Helper()
	got, err := c.from.ReadString('\n')
	if err != nil || got != want+"\n" {
		t.Fatalf("child told %q, %v; want %q", got, err, want)
	}
}

func TestExitCodeAndLastWords(t *testing.T) {
	c := start(t, "exit7")
	<-c.Done()
	if diff := cmp.Diff(proc.Exit{Known: true, Code: 7}, c.Exit()); diff != "" {
		t.Error(diff)
	}
	if got, want := c.LastWords(), "first line; second ?[31mline; cannot open disk"; got != want {
		t.Errorf("last words %q, want %q", got, want)
	}
	if b, err := os.ReadFile(c.log); err != nil || !strings.HasSuffix(string(b), "cannot open disk\n") {
		t.Errorf("log %q, %v", b, err)
	}
	if err := c.Kill(t.Context()); err != nil {
		t.Errorf("kill of an ended child: %v", err)
	}
	if err := c.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("signal to an ended child: %v", err)
	}
}

func TestKill(t *testing.T) {
	c := start(t, "wait")
	if err := c.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(proc.Exit{Known: true, Signal: syscall.SIGKILL}, c.Exit()); diff != "" {
		t.Error(diff)
	}
	if _, err := proc.Identify(c.ID().PID); !fault.Is(err, fault.NotFound) {
		t.Errorf("after a kill the process is not reaped: %v", err)
	}
}

func TestStopLadder(t *testing.T) {
	for role, want := range map[string]proc.Exit{
		"polite":   {Known: true, Code: 3},
		"stubborn": {Known: true, Signal: syscall.SIGKILL},
	} {
		t.Run(role, func(t *testing.T) {
			c := start(t, role)
			c.expect(t, "ready")
			grace := time.Minute
			if role == "stubborn" {
				grace = time.Millisecond
			}
			if err := c.Stop(t.Context(), grace); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, c.Exit()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStopGivesUpWithItsContext(t *testing.T) {
	c := start(t, "stubborn")
	c.expect(t, "ready")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Stop(ctx, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("stop: %v", err)
	}
	if _, err := proc.Identify(c.ID().PID); err != nil {
		t.Errorf("the child is gone: %v", err)
	}
}

func TestStartErrors(t *testing.T) {
	testenv.CheckGoroutines(t)
	if _, err := proc.Start(t.Context(), proc.Params{Path: "/nonexistent/program"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing program: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := proc.Start(ctx, proc.Params{Path: "/proc/self/exe"}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	refuse := errors.New("no thread")
	if _, err := proc.Start(t.Context(), proc.Params{
		Path: "/proc/self/exe", Spawn: func(func() (int, error)) error { return refuse },
	}); !errors.Is(err, refuse) {
		t.Errorf("spawn refused: %v", err)
	}
	// A spawner that fails after the fork leaves no child either.
	if _, err := proc.Start(t.Context(), proc.Params{
		Path: "/proc/self/exe", Env: []string{roleEnv + "=wait"},
		Spawn: func(fork func() (int, error)) error {
			_, err := fork()
			return errors.Join(err, refuse)
		},
	}); !errors.Is(err, refuse) {
		t.Errorf("spawn failed late: %v", err)
	}
	if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("a child is left: wait4 gives %d, %v", pid, err)
	}
}

func TestChildIsApart(t *testing.T) {
	c := start(t, "stubborn")
	c.expect(t, "ready")
	if sid, err := sessionOf(c.ID().PID); err != nil || sid != c.ID().PID {
		t.Errorf("child is in session %d, %v; want its own", sid, err)
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.ID().PID))
	if err != nil || string(env) != roleEnv+"=stubborn\x00" {
		t.Errorf("environment %q, %v", env, err)
	}
}

func sessionOf(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	var state string
	var ppid, pgrp, sid int
	_, err = fmt.Sscan(string(b[strings.LastIndexByte(string(b), ')')+1:]), &state, &ppid, &pgrp, &sid)
	return sid, err
}

func TestOutputWithoutReaderIsBounded(t *testing.T) {
	c := start(t, "flood")
	c.Close()
	fmt.Fprintln(c.to, "go")
	c.expect(t, "flooded") // it was not blocked and not killed
	p, err := proc.Adopt(t.Context(), c.ID(), proc.AdoptParams{Log: c.log})
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, p)
	waitLog(t, c.log, 4<<10) // the pipe is being emptied again
	fmt.Fprintln(c.to, "more")
	c.expect(t, "spoken")
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := size(t, c.log); got > 1<<20 {
		t.Errorf("log holds %d bytes of an unread pipe", got)
	}
	if b, err := os.ReadFile(c.log); err != nil || !strings.HasSuffix(string(b), "after the flood\n") {
		t.Errorf("the log does not end in the last words: %v", err)
	}
	if diff := cmp.Diff(proc.Exit{Known: true, Signal: syscall.SIGKILL}, p.Exit()); diff != "" {
		t.Error("an adopted child of our own tells its status: " + diff)
	}
}

// waitLog waits until the log at path has at least n bytes.
func waitLog(t *testing.T, path string, n int64) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for size(t, path) < n {
		if time.Now().After(deadline) {
			t.Fatalf("log has %d bytes, want %d", size(t, path), n)
		}
		select {
		case <-t.Context().Done():
			t.Fatal("out of time")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// TestParentKilled kills the parent in the middle: the child lives, goes on
// writing, and a second parent finds its words.
func TestParentKilled(t *testing.T) {
	testenv.CheckGoroutines(t)
	outR, outW := pipe(t)
	inR, inW := pipe(t)
	log := filepath.Join(t.TempDir(), "log")
	cmd := exec.Command("/proc/self/exe", log)
	cmd.Env = []string{roleEnv + "=parent"}
	cmd.ExtraFiles = []*os.File{outW, inR}
	told, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	outW.Close()
	inR.Close()
	var id sandbox.Process
	if err := json.NewDecoder(told).Decode(&id); err != nil {
		t.Fatal(err)
	}
	c := child{from: bufio.NewReader(outR), to: inW}
	fmt.Fprintln(c.to, "one")
	c.expect(t, "ok")
	cmd.Process.Kill()
	cmd.Wait()
	fmt.Fprintln(c.to, "two") // nobody reads the log now
	c.expect(t, "ok")

	p, err := proc.Adopt(t.Context(), id, proc.AdoptParams{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, p)
	fmt.Fprintln(c.to, "three")
	c.expect(t, "ok")
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	// "one" may have been read by the first parent and died with it.
	if got := strings.TrimPrefix(string(b), "said one\n"); got != "said two\nsaid three\n" {
		t.Errorf("log %q", b)
	}
	if p.Exit().Known {
		t.Errorf("exit of a stranger's child: %v", p.Exit())
	}
	if got := p.LastWords(); !strings.HasSuffix(got, "said three") {
		t.Errorf("last words %q", got)
	}
}

func TestAdoptOnlyTheVeryProcess(t *testing.T) {
	c := start(t, "stubborn")
	c.expect(t, "ready")
	c.Close()
	other := func(change func(*sandbox.Process)) sandbox.Process {
		id := c.ID()
		change(&id)
		return id
	}
	for name, id := range map[string]sandbox.Process{
		"other start": other(func(p *sandbox.Process) { p.StartTicks++ }),
		"other boot":  other(func(p *sandbox.Process) { p.BootID = "2b3c" }),
		"init":        other(func(p *sandbox.Process) { p.PID = 1 }),
		"no pid":      other(func(p *sandbox.Process) { p.PID = 0 }),
		"negative":    other(func(p *sandbox.Process) { p.PID = -1 }),
		"unused":      other(func(p *sandbox.Process) { p.PID = 1 << 22 }),
	} {
		if _, err := proc.Adopt(t.Context(), id, proc.AdoptParams{}); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v, want not found", name, err)
		}
	}
	p, err := proc.Adopt(t.Context(), c.ID(), proc.AdoptParams{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(c.ID(), p.ID()); diff != "" {
		t.Error(diff)
	}
	p.Close()
	p.Close()
	// A zombie of ours is reaped and counts as gone.
	syscall.Kill(c.ID().PID, syscall.SIGKILL)
	p, err = proc.Adopt(t.Context(), c.ID(), proc.AdoptParams{})
	if err == nil { // the signal was not yet delivered
		<-p.Done()
		p.Close()
	} else if !fault.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
	if pid, err := syscall.Wait4(c.ID().PID, nil, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("the child is not reaped: wait4 gives %d, %v", pid, err)
	}
}

func TestManyWait(t *testing.T) {
	c := start(t, "stubborn")
	c.expect(t, "ready")
	got := make(chan error)
	for range 20 {
		go func() { got <- c.Kill(t.Context()) }()
	}
	for range 20 {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
}

func TestKillAfterClose(t *testing.T) {
	c := start(t, "stubborn")
	c.expect(t, "ready")
	c.Close()
	if err := c.Kill(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("kill after close: %v", err)
	}
	p, err := proc.Adopt(t.Context(), c.ID(), proc.AdoptParams{})
	if err != nil {
		t.Fatal(err)
	}
	end(t, p)
}

func TestCappedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	c, err := proc.CreateCapped(path, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for i := range 300 {
		s := fmt.Sprintf("line %d\n", i)
		all.WriteString(s)
		if i == 150 { // a later process goes on where this one was
			c.Close()
			if c, err = proc.CreateCapped(path, 1000); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := c.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
		if a, b := size(t, path), sizeOrZero(path+".1"); a > 500 || b > 500 {
			t.Fatalf("after line %d: %d and %d bytes", i, a, b)
		}
	}
	r, err := proc.OpenCapped(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if len(got) < 500 || !strings.HasSuffix(all.String(), string(got)) {
		t.Errorf("kept %d bytes that are not the end of what was written:\n%s", len(got), got)
	}
	// One write larger than everything.
	c.Write([]byte(strings.Repeat("y", 10000)))
	if a, b := size(t, path), sizeOrZero(path+".1"); a > 500 || b > 500 {
		t.Errorf("after a large write: %d and %d bytes", a, b)
	}
	if err := c.Err(); err != nil {
		t.Errorf("lost words: %v", err)
	}
	c.Close()
	c.Write([]byte("late"))
	if err := c.Err(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
}

func sizeOrZero(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

func TestCappedFileRefusesLinks(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.Symlink(filepath.Join(dir, "target"), path); err != nil {
		t.Fatal(err)
	}
	if _, err := proc.CreateCapped(path, 0); err == nil {
		t.Error("a symbolic link was followed for writing")
	}
	if _, err := proc.OpenCapped(path); err == nil {
		t.Error("a symbolic link was followed for reading")
	}
	if _, err := proc.OpenCapped(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no log: %v", err)
	}
	if _, err := proc.CreateCapped("/dev/full", 0); err == nil {
		t.Error("a device was taken for a log")
	}
}

func TestCappedFileNeverFailsItsWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c, err := proc.CreateCapped(filepath.Join(dir, "log"), 100)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	os.RemoveAll(dir)
	for range 10 {
		if n, err := c.Write(make([]byte, 40)); n != 40 || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
	}
	if err := c.Err(); err == nil || !strings.Contains(err.Error(), "lost 3") {
		t.Errorf("the log tells of no loss: %v", err)
	}
}
