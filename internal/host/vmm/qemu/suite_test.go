package qemu_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu"
	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

const (
	testUID = 64998
	logMax  = 64 << 10
)

// bench has what the machines of this package's tests share.
type bench struct {
	jail           *jail.Jail
	driver         *qemu.Driver
	parent         string
	kernel, initrd string
}

func newBench(t testing.TB) *bench {
	t.Helper()
	testenv.RequireVM(t)
	b := &bench{parent: fmt.Sprintf("hutch-vmm-%d", os.Getpid())}
	j, err := jail.New(jail.Params{Parent: b.parent})
	if err != nil {
		t.Fatal(err)
	}
	b.jail = j
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Errorf("a cgroup is left: %v", err)
		}
	})
	b.kernel, b.initrd = vmmtest.Boot(t)
	if b.kernel, err = filepath.EvalSymlinks(b.kernel); err != nil {
		t.Fatal(err)
	}
	b.driver = b.newDriver(t)
	caps := b.driver.Caps()
	t.Logf("QEMU %s, %s: %s", caps.Version, caps.Accel, caps.AccelReason)
	return b
}

func (b *bench) newDriver(t testing.TB) *qemu.Driver {
	t.Helper()
	d, err := qemu.New(testenv.Context(t), qemu.Params{Jail: b.jail, LogMax: logMax, Hide: []string{"/root", os.TempDir()}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (b *bench) spec(t testing.TB) vmm.Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "hutch-vmm") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, log := range []string{"console.log", "vmm.log"} {
				words, _ := os.ReadFile(filepath.Join(dir, log))
				t.Logf("%s ends in:\n%s", log, words[max(0, len(words)-3000):])
			}
		}
		os.RemoveAll(dir)
	})
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	return vmm.Spec{
		ID: sandbox.NewID(), VCPUs: 1, MemoryMB: 128, UID: testUID, Kernel: b.kernel, Initrd: b.initrd,
		Dir: run, ConsoleLog: filepath.Join(dir, "console.log"), VMMLog: filepath.Join(dir, "vmm.log"),
	}
}

// left looks for processes and cgroups of a machine.
func (b *bench) left(t testing.TB, spec vmm.Spec) (left []string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if line, err := os.ReadFile(p); err == nil && strings.Contains(string(line), "guest="+string(spec.ID)) {
			left = append(left, p)
		}
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/" + b.parent + "/" + string(spec.ID))
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("/sys/fs/cgroup/" + b.parent + "/" + string(spec.ID))
	if err != nil {
		t.Fatal(err)
	}
	return append(append(left, groups...), more...)
}

func TestSuite(t *testing.T) { vmmtest.Run(t, newBench(t).harness()) }

func TestSnapshots(t *testing.T) { vmmtest.RunSnapshots(t, newBench(t).harness()) }

func (b *bench) harness() vmmtest.Harness {
	return vmmtest.Harness{
		Driver: func(t testing.TB) vmm.Driver { return b.driver },
		Spec:   b.spec,
		Crash: func(t testing.TB, m sandbox.Machine) {
			if err := unix.Kill(m.Process.PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
		Ended:  ended,
		Left:   b.left,
		LogMax: logMax,
		FillMB: 40,
	}
}

// ended waits for the end of a process, also one that nobody has reaped.
func ended(t testing.TB, m sandbox.Machine) {
	t.Helper()
	fd, err := unix.PidfdOpen(m.Process.PID, 0)
	if err == unix.ESRCH {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for ctx := testenv.Context(t); ctx.Err() == nil; {
		set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(set, 100); n > 0 {
			return
		} else if err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
	}
	t.Fatal("the VMM does not end")
}

func end(t testing.TB, v vmm.VM) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 20*time.Second)
	defer cancel()
	if err := v.Kill(ctx); err != nil {
		t.Error(err)
	}
	v.Close()
}

// TestConfinement looks at a running QEMU from outside.
func TestConfinement(t *testing.T) {
	b := newBench(t)
	testenv.CheckGoroutines(t)
	spec := b.spec(t)
	v, err := b.driver.Launch(testenv.Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	pid := v.Machine().Process.PID
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that has ended
		}
		got := map[string]string{}
		for l := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(l, ":")
			got[k] = strings.Join(strings.Fields(v), " ")
		}
		uid := fmt.Sprint(testUID)
		for k, want := range map[string]string{
			"Uid": strings.Join([]string{uid, uid, uid, uid}, " "), "Gid": strings.Join([]string{uid, uid, uid, uid}, " "),
			"Groups": "", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000",
			"NoNewPrivs": "1", "Seccomp": "2",
		} {
			if got[k] != want {
				t.Errorf("%s: %s is %q, want %q", task, k, got[k], want)
			}
		}
	}
	// Everything QEMU holds open is what it was given, or its own.
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]bool{spec.Kernel: true, spec.Initrd: true, "/dev/null": true, "/dev/kvm": true, spec.VMMLog + ".qmp": true}
	for _, l := range links {
		name, err := os.Readlink(l)
		if err != nil || allowed[name] {
			continue
		}
		if strings.HasPrefix(name, "/") && !strings.HasPrefix(name, "/memfd:") {
			t.Errorf("QEMU holds %s", name)
		}
	}
}

// TestNIC boots with a tap in a network namespace.
func TestNIC(t *testing.T) {
	b := newBench(t)
	ns, tap := newTap(t)
	spec := b.spec(t)
	spec.Netns, spec.NIC = ns, &vmm.NIC{Tap: tap, MAC: "02:00:00:00:0A:01"}
	v, err := b.driver.Launch(testenv.Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	tap.Close()
	g, err := vmmtest.DialGuest(testenv.Context(t), v)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if mac, err := g.Ask(testenv.Context(t), "query mac"); err != nil || mac != "02:00:00:00:0a:01" {
		t.Errorf("the guest's MAC is %q, %v", mac, err)
	}
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", v.Machine().Process.PID))
	if want, _ := os.Readlink(ns); err != nil || own != want {
		t.Errorf("QEMU is in %s, want %s, %v", own, want, err)
	}
}

// newTap makes a network namespace with a tap. The thread that it lives on
// ends with the test.
func newTap(t *testing.T) (ns string, tap *os.File) {
	t.Helper()
	made, stop := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		_, err := netns.New()
		ns = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		if err == nil {
			link := &netlink.Tuntap{
				LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP, Queues: 1,
				Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE,
			}
			if err = netlink.LinkAdd(link); err == nil && len(link.Fds) == 1 {
				tap = link.Fds[0]
			}
		}
		made <- err
		<-stop
	}()
	err := <-made
	t.Cleanup(func() { close(stop) })
	if err != nil || tap == nil {
		t.Fatal("make tap: ", err)
	}
	return ns, tap
}

// TestKernelThatQEMURefuses gives QEMU what it cannot boot: its own words must
// be in the error.
func TestKernelThatQEMURefuses(t *testing.T) {
	b := newBench(t)
	testenv.CheckGoroutines(t)
	spec := b.spec(t)
	spec.Kernel = filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(spec.Kernel, []byte("\x7fELF no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	v, err := b.driver.Launch(testenv.Context(t), spec)
	if err == nil {
		end(t, v)
	}
	if err == nil || !strings.Contains(err.Error(), "QEMU exited 1") || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("launch: %v", err)
	}
	t.Log(err)
	if err := os.Chmod(spec.Kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.driver.Launch(testenv.Context(t), spec); err == nil || !strings.Contains(err.Error(), "chmod o+r") {
		t.Errorf("launch with a kernel that QEMU may not read: %v", err)
	}
	if l := b.left(t, spec); l != nil {
		t.Errorf("left: %v", l)
	}
}

// TestLaunchTwice tests that a second machine of the same id, or on the same
// disk, does no harm to the first.
func TestLaunchTwice(t *testing.T) {
	b := newBench(t)
	ctx := testenv.Context(t)
	spec := b.spec(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	spec.Disks = []vmm.Disk{{Serial: "data", Path: disk}}
	v, err := b.driver.Launch(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { end(t, v) }()
	if w, err := b.driver.Launch(ctx, spec); err == nil || !strings.Contains(err.Error(), "a running machine has it") {
		t.Errorf("same id: %v", err)
		if err == nil {
			end(t, w)
		}
	}
	other := b.spec(t)
	other.Disks = spec.Disks
	if w, err := b.driver.Launch(ctx, other); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("same disk: %v", err)
		if err == nil {
			end(t, w)
		}
	}
	if running, err := v.Running(ctx); !running || err != nil {
		t.Errorf("the first machine: %v, %v", running, err)
	}
	// It can still be adopted: its sockets are there.
	v.Close()
	if v, err = b.driver.Adopt(ctx, v.Machine(), spec); err != nil {
		t.Fatal(err)
	}
	if running, err := v.Running(ctx); !running || err != nil {
		t.Errorf("the first machine: %v, %v", running, err)
	}
}

// TestStoppedQEMU tests a QEMU that does not answer: calls end with their
// contexts, and it can be killed.
func TestStoppedQEMU(t *testing.T) {
	b := newBench(t)
	testenv.CheckGoroutines(t)
	spec := b.spec(t)
	v, err := b.driver.Launch(testenv.Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { end(t, v) }()
	if err := unix.Kill(v.Machine().Process.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	paused := make(chan error)
	go func() { paused <- v.Pause(ctx) }()
	cancel()
	if err := <-paused; !fault.Is(err, fault.Canceled) {
		t.Errorf("pause: %v", err)
	}
	m := v.Machine()
	v.Close()
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if v, err = b.driver.Adopt(short, m, spec); err != nil {
		t.Fatalf("adopt: %v", err)
	}
	if _, err := v.Running(short); err == nil {
		t.Error("a stopped QEMU says it runs")
	}
	if err := v.Kill(testenv.Context(t)); err != nil {
		t.Error(err)
	}
	if e := v.Exit(); e.Reason != vmm.Killed {
		t.Errorf("exit: %+v", e)
	}
}

// TestTwentyAtOnce launches and ends many machines at the same time.
func TestTwentyAtOnce(t *testing.T) {
	b := newBench(t)
	testenv.CheckGoroutines(t)
	ctx := testenv.Context(t)
	shared := filepath.Join(t.TempDir(), "image") // as a template's is
	if err := os.WriteFile(shared, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	specs := make([]vmm.Spec, 20)
	for i := range specs {
		specs[i] = b.spec(t)
		specs[i].MemoryMB = 128 // less, and the kernel panics before the last one is up
		specs[i].Disks = []vmm.Disk{{Serial: "root", Path: shared, ReadOnly: true}}
	}
	var wait, all sync.WaitGroup
	all.Add(len(specs))
	for _, spec := range specs {
		wait.Go(func() {
			v, err := b.driver.Launch(ctx, spec)
			if err != nil {
				t.Error(err)
				all.Done()
				return
			}
			defer end(t, v)
			all.Done()
			all.Wait() // they live at the same time
			if running, err := v.Running(ctx); !running || err != nil {
				t.Errorf("%s: running %v, %v", spec.ID, running, err)
			}
		})
	}
	wait.Wait()
	for _, spec := range specs {
		if l := b.left(t, spec); l != nil {
			t.Errorf("left: %v", l)
		}
		if files, err := os.ReadDir(spec.Dir); err != nil || len(files) > 0 {
			t.Errorf("left: %v, %v", files, err)
		}
	}
}

// TestTerminated ends QEMU by SIGTERM, as a host that shuts down does.
func TestTerminated(t *testing.T) {
	b := newBench(t)
	v, err := b.driver.Launch(testenv.Context(t), b.spec(t))
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	if err := unix.Kill(v.Machine().Process.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-v.Done()
	if e := v.Exit(); e.Reason != vmm.Crashed || !strings.Contains(e.Detail, "host-signal") {
		t.Errorf("exit: %+v", e)
	}
}

// TestOutOfMemory gives QEMU a cgroup that is too small for its guest.
func TestOutOfMemory(t *testing.T) {
	b := newBench(t)
	spec := b.spec(t)
	v, err := b.driver.Launch(testenv.Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	limit := filepath.Join("/sys/fs/cgroup/memory", b.parent, string(spec.ID), "memory.limit_in_bytes")
	if _, err := os.Stat(limit); err != nil {
		t.Skip("needs cgroup v1 memory limits: ", err)
	}
	// The guest's boot soon needs more than this.
	if err := os.WriteFile(limit, []byte("50M"), 0); err != nil {
		t.Skip("cannot lower the limit: ", err)
	}
	select {
	case <-v.Done():
	case <-testenv.Context(t).Done():
		t.Fatal("the limit does not bite")
	}
	if e := v.Exit(); e.Reason != vmm.Crashed || !strings.Contains(e.Detail, "memory") {
		t.Errorf("exit: %+v", e)
	}
}

func TestNewErrors(t *testing.T) {
	testenv.RequireVM(t)
	j, err := jail.New(jail.Params{Parent: fmt.Sprintf("hutch-vmm-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for name, tt := range map[string]struct {
		p    qemu.Params
		want string
	}{
		"no jail":     {qemu.Params{}, "jail"},
		"no QEMU":     {qemu.Params{Jail: j, Binary: "/nonexistent/qemu"}, "apt install"},
		"another one": {qemu.Params{Jail: j, Binary: "/bin/echo"}, "it said"},
		"accelerator": {qemu.Params{Jail: j, Accel: "warp"}, "none of auto, kvm, tcg"},
	} {
		if _, err := qemu.New(testenv.Context(t), tt.p); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
