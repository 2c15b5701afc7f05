package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// Harness is what the suite needs of a driver.
type Harness struct {
	// Driver returns a driver as a process that has just started would have
	// it: it knows nothing of the VMs of another one.
	Driver func(t testing.TB) vmm.Driver
	// Spec returns the spec of a machine with the suite's guest, without disks
	// and network, in directories of its own. Its id is new.
	Spec func(t testing.TB) vmm.Spec
	// Crash ends a VMM from outside, as SIGKILL does.
	Crash func(t testing.TB, m sandbox.Machine)
	// Ended waits until a VMM that nobody holds has ended.
	Ended func(t testing.TB, m sandbox.Machine)
	// Left lists what is on the host of the machine of spec.
	Left func(t testing.TB, spec vmm.Spec) []string
	// LogMax is the bound of each log, in bytes.
	LogMax int64
	// FillMB is how much of its memory a guest fills with a pattern, in MB, for
	// RunSnapshots. Nearly three times as much must fit into a guest that has
	// 64 MB more than Spec says.
	FillMB int
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	s := suite{h}
	t.Run("Life", s.life)
	t.Run("GuestPanic", func(t *testing.T) { s.ends(t, "panic", vmm.GuestPanic, "Kernel panic") })
	t.Run("GuestReset", func(t *testing.T) { s.ends(t, "reboot", vmm.GuestReset, "") })
	t.Run("Kill", s.kill)
	t.Run("Crash", s.crash)
	t.Run("CrashAfterAdopt", s.crashAfterAdopt)
	t.Run("PowerOffAway", func(t *testing.T) { s.away(t, vmm.GuestPowerOff) })
	t.Run("CrashAway", func(t *testing.T) { s.away(t, vmm.Crashed) })
	t.Run("LaunchCancelled", s.launchCancelled)
	t.Run("LaunchFails", s.launchFails)
	t.Run("BadSpec", s.badSpec)
	t.Run("FiveAtOnce", s.fiveAtOnce)
}

type suite struct{ Harness }

// begin makes a test that leaves nothing.
func (s suite) begin(t *testing.T) (context.Context, vmm.Spec) {
	t.Helper()
	testenv.CheckGoroutines(t)
	spec := s.Spec(t)
	t.Cleanup(func() { s.nothingLeft(t, spec) })
	fds := openFiles(t)
	t.Cleanup(func() {
		if now := openFiles(t); len(now) > len(fds) {
			t.Errorf("%d files are open, %d were before: %v", len(now), len(fds), now)
		}
	})
	return testenv.Context(t), spec
}

func (s suite) nothingLeft(t *testing.T, spec vmm.Spec) {
	t.Helper()
	if diff := cmp.Diff([]string(nil), s.Left(t, spec)); diff != "" {
		t.Errorf("left on the host (+):\n%s", diff)
	}
	files, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Error(err)
	}
	for _, f := range files {
		t.Errorf("left in the directory: %s", f.Name())
	}
}

func openFiles(t *testing.T) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		if name, err := os.Readlink(l); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// launch launches spec, and ends it with the test.
func (s suite) launch(t *testing.T, ctx context.Context, spec vmm.Spec) vmm.VM {
	t.Helper()
	// The life of a machine has nothing to do with the launch's context.
	short, cancel := context.WithCancel(ctx)
	v, err := s.Driver(t).Launch(short, spec)
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, v) })
	return v
}

func end(t *testing.T, v vmm.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
	defer cancel()
	if err := v.Kill(ctx); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Errorf("kill: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func (s suite) dial(t *testing.T, ctx context.Context, v vmm.VM) *Guest {
	t.Helper()
	g, err := DialGuest(ctx, v)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func ask(t *testing.T, ctx context.Context, g *Guest, request string) string {
	t.Helper()
	answer, err := g.Ask(ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func waitDone(t *testing.T, ctx context.Context, v vmm.VM) {
	t.Helper()
	select {
	case <-v.Done():
	case <-ctx.Done():
		t.Fatal("the machine does not end")
	}
}

func running(t *testing.T, ctx context.Context, v vmm.VM, want bool) {
	t.Helper()
	if got, err := v.Running(ctx); err != nil || got != want {
		t.Errorf("running: %v, %v; want %v", got, err, want)
	}
}

// afterTheEnd is what holds of every machine that is gone.
func (s suite) afterTheEnd(t *testing.T, ctx context.Context, v vmm.VM, spec vmm.Spec) {
	t.Helper()
	if err := v.Kill(ctx); err != nil {
		t.Errorf("kill after the end: %v", err)
	}
	if err := v.Pause(ctx); !fault.Is(err, fault.Unavailable) {
		t.Errorf("pause after the end: %v", err)
	}
	if conn, err := v.DialLink(ctx); !fault.Is(err, fault.Unavailable) {
		t.Errorf("link after the end: %v", err)
		if err == nil {
			conn.Close()
		}
	}
	before := v.Exit()
	if a, err := s.Driver(t).Adopt(ctx, v.Machine(), spec); !fault.Is(err, fault.NotFound) {
		t.Errorf("adopt after the end: %v", err)
		if err == nil {
			a.Close()
		}
	}
	for range 2 {
		if err := v.Close(); err != nil {
			t.Errorf("close after the end: %v", err)
		}
	}
	if diff := cmp.Diff(before, v.Exit()); diff != "" {
		t.Error(diff)
	}
}

// ends ends a guest by a command.
func (s suite) ends(t *testing.T, command string, want vmm.Reason, detail string) {
	ctx, spec := s.begin(t)
	v := s.launch(t, ctx, spec)
	g := s.dial(t, ctx, v)
	ask(t, ctx, g, "echo up")
	g.Ask(ctx, command) // may or may not be answered
	waitDone(t, ctx, v)
	if e := v.Exit(); e.Reason != want || !strings.Contains(e.Detail, detail) {
		t.Errorf("exit: %+v, want %q with %q", e, want, detail)
	}
	s.afterTheEnd(t, ctx, v, spec)
}

func (s suite) kill(t *testing.T) {
	ctx, spec := s.begin(t)
	v := s.launch(t, ctx, spec)
	if e := v.Exit(); e != (vmm.Exit{}) {
		t.Errorf("exit of a live machine: %+v", e)
	}
	if err := v.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	for range 10 {
		wait.Go(func() {
			if err := v.Kill(ctx); err != nil {
				t.Errorf("kill: %v", err)
			}
		})
	}
	wait.Wait()
	select {
	case <-v.Done():
	default:
		t.Error("a killed machine is not done")
	}
	if e := v.Exit(); e.Reason != vmm.Killed {
		t.Errorf("exit: %+v", e)
	}
	s.afterTheEnd(t, ctx, v, spec)
}

func (s suite) crash(t *testing.T) {
	ctx, spec := s.begin(t)
	v := s.launch(t, ctx, spec)
	conn, err := v.DialLink(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.Crash(t, v.Machine())
	waitDone(t, ctx, v)
	if e := v.Exit(); e.Reason != vmm.Crashed || !strings.Contains(e.Detail, "SIGKILL") {
		t.Errorf("exit: %+v", e)
	}
	if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("link of a crashed machine: %v", err)
	}
	s.afterTheEnd(t, ctx, v, spec)
}

func (s suite) crashAfterAdopt(t *testing.T) {
	ctx, spec := s.begin(t)
	v := s.launch(t, ctx, spec)
	m := v.Machine()
	v.Close()
	v, err := s.Driver(t).Adopt(ctx, m, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, v) })
	s.Crash(t, m)
	waitDone(t, ctx, v)
	if e := v.Exit(); e.Reason != vmm.Crashed {
		t.Errorf("exit: %+v", e)
	}
	s.afterTheEnd(t, ctx, v, spec)
}

// away has a machine end while nobody holds it: who comes next is told how,
// and told the same when asked again.
func (s suite) away(t *testing.T, want vmm.Reason) {
	ctx, spec := s.begin(t)
	v := s.launch(t, ctx, spec)
	m := v.Machine()
	g := s.dial(t, ctx, v)
	ask(t, ctx, g, "echo up")
	if want == vmm.GuestPowerOff {
		ask(t, ctx, g, "later poweroff")
	}
	v.Close()
	if want == vmm.Crashed {
		s.Crash(t, m)
	}
	s.Ended(t, m)
	for range 2 {
		a, err := s.Driver(t).Adopt(ctx, m, spec)
		if err == nil {
			end(t, a)
		}
		var gone *vmm.Gone
		if !fault.Is(err, fault.NotFound) || !errors.As(err, &gone) || gone.Exit.Reason != want || gone.Exit.Detail == "" {
			t.Errorf("adopt after the end: %v, %+v; want %q", err, gone, want)
		}
	}
	// A machine that is made anew has not ended.
	next := s.launch(t, ctx, spec)
	running(t, ctx, next, true)
}

// launchCancelled gives a launch up at many points.
func (s suite) launchCancelled(t *testing.T) {
	ctx, spec := s.begin(t)
	d := s.Driver(t)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if v, err := d.Launch(cancelled, spec); !fault.Is(err, fault.Canceled) {
		t.Errorf("cancelled before: %v", err)
		if err == nil {
			end(t, v)
		}
	}
	s.nothingLeft(t, spec)
	for _, after := range []time.Duration{0, 1, 3, 10, 30, 60, 100, 150, 200, 300} {
		short, cancel := context.WithTimeout(ctx, after*time.Millisecond)
		v, err := d.Launch(short, spec)
		cancel()
		if err == nil {
			end(t, v)
		} else if !errors.Is(err, context.DeadlineExceeded) || !fault.Is(err, fault.Deadline) {
			t.Errorf("given up after %v ms: %v", after, err)
		}
		s.nothingLeft(t, spec)
	}
}

func (s suite) launchFails(t *testing.T) {
	ctx, good := s.begin(t)
	dir := t.TempDir()
	empty, odd := filepath.Join(dir, "empty"), filepath.Join(dir, "odd")
	if err := errors.Join(os.WriteFile(empty, nil, 0o644), os.WriteFile(odd, make([]byte, 1000), 0o644)); err != nil {
		t.Fatal(err)
	}
	disk := func(path string) []vmm.Disk { return []vmm.Disk{{Serial: "data", Path: path}} }
	for name, tt := range map[string]struct {
		change func(*vmm.Spec)
		want   string // in the error
	}{
		"missing kernel": {func(s *vmm.Spec) { s.Kernel = dir + "/no-kernel" }, "no-kernel"},
		"empty kernel":   {func(s *vmm.Spec) { s.Kernel = empty }, "empty"},
		"missing initrd": {func(s *vmm.Spec) { s.Initrd = dir + "/no-initrd" }, "no-initrd"},
		"missing disk":   {func(s *vmm.Spec) { s.Disks = disk(dir + "/no-disk") }, "no-disk"},
		"directory disk": {func(s *vmm.Spec) { s.Disks = disk(dir) }, dir},
		"odd disk":       {func(s *vmm.Spec) { s.Disks = disk(odd) }, "512-byte"},
		"missing dir":    {func(s *vmm.Spec) { s.Dir = dir + "/no-dir" }, "no-dir"},
		"missing netns":  {func(s *vmm.Spec) { s.Netns = dir + "/no-netns" }, "no-netns"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := good
			tt.change(&spec)
			v, err := s.Driver(t).Launch(ctx, spec)
			if err == nil {
				end(t, v)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), string(spec.ID)) {
				t.Errorf("error %v, want one with %q and the id", err, tt.want)
			}
			s.nothingLeft(t, good)
		})
	}
}

// badSpec are specs that no driver may take.
func (s suite) badSpec(t *testing.T) {
	ctx, good := s.begin(t)
	for field, change := range map[string]func(*vmm.Spec){
		"id":        func(s *vmm.Spec) { s.ID = "a,b" },
		"vcpus":     func(s *vmm.Spec) { s.VCPUs = 0 },
		"memory_mb": func(s *vmm.Spec) { s.MemoryMB = -1 },
		"uid":       func(s *vmm.Spec) { s.UID = 0 },
		"cmdline":   func(s *vmm.Spec) { s.Cmdline = "a\nb" },
		"kernel":    func(s *vmm.Spec) { s.Kernel = "vmlinuz" },
		"disks":     func(s *vmm.Spec) { s.Disks = []vmm.Disk{{Serial: "a,b=c", Path: "/x"}} },
		"nic":       func(s *vmm.Spec) { s.NIC = &vmm.NIC{MAC: "02:00:00:00:00:01"} },
		"dir":       func(s *vmm.Spec) { s.Dir = "/" + strings.Repeat("x", 200) },
	} {
		spec := good
		change(&spec)
		v, err := s.Driver(t).Launch(ctx, spec)
		if err == nil {
			end(t, v)
		}
		var bad *fault.Error
		if !fault.Is(err, fault.Invalid) || !errors.As(err, &bad) || bad.Field != field {
			t.Errorf("%s: error %v, want an invalid field", field, err)
		}
	}
}

func (s suite) fiveAtOnce(t *testing.T) {
	ctx, spec := s.begin(t)
	d := s.Driver(t)
	specs := []vmm.Spec{spec}
	for range 4 {
		specs = append(specs, s.Spec(t))
	}
	var wait sync.WaitGroup
	for _, spec := range specs {
		wait.Go(func() {
			if err := oneOfMany(ctx, d, spec); err != nil {
				t.Errorf("%s: %v", spec.ID, err)
			}
		})
	}
	wait.Wait()
	for _, spec := range specs {
		s.nothingLeft(t, spec)
	}
}

func oneOfMany(ctx context.Context, d vmm.Driver, spec vmm.Spec) (err error) {
	v, err := d.Launch(ctx, spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Kill(context.WithoutCancel(ctx)), v.Close()) }()
	g, err := DialGuest(ctx, v)
	if err != nil {
		return err
	}
	defer g.Close()
	answer, err := g.Ask(ctx, "echo "+string(spec.ID))
	if err == nil && answer != string(spec.ID) {
		err = fmt.Errorf("another guest answered: %q", answer)
	}
	return err
}
