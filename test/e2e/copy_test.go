package e2e

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/disk"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// copier makes machines and copies of them without a hutchd: its steps one by
// one, and what is between them.
type copier struct {
	t      *testing.T
	dir    string
	driver *qemu.Driver
	pack   kernel.Pack
	image  string
	disks  *disk.Disks
}

func newCopier(t *testing.T) *copier {
	t.Helper()
	d := harness.Start(t, harness.Options{}) // for its root, and the leak check
	c := &copier{t: t, dir: d.Dir}
	kernels, err := kernel.Open(d.Root)
	if err == nil {
		c.pack, err = kernels.Current()
	}
	if err != nil {
		t.Fatal(err)
	}
	templates, err := template.Open(template.Params{Root: d.Root})
	if err == nil {
		_, c.image, err = templates.Resolve("minimal")
	}
	if err != nil {
		t.Fatal(err)
	}
	j, err := jail.New(jail.Params{Parent: fmt.Sprintf("hutch-copy-%d", os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Errorf("a cgroup is left: %v", err)
		}
	})
	if c.driver, err = qemu.New(testenv.Context(t), qemu.Params{Jail: j}); err != nil {
		t.Fatal(err)
	}
	c.disks = disk.New(disk.Params{BlankDir: filepath.Join(d.Root, "blank"), Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(c.disks.Close)
	return c
}

// spec describes a machine whose data disk is not there yet.
func (c *copier) spec(name string) vmm.Spec {
	c.t.Helper()
	dir := filepath.Join(c.dir, name)
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o711); err != nil {
		c.t.Fatal(err)
	}
	return vmm.Spec{
		ID: sandbox.ID(name), VCPUs: 1, MemoryMB: 128, UID: 64990, Kernel: c.pack.Kernel, Initrd: c.pack.Initrd, Cmdline: "quiet",
		Disks: []vmm.Disk{
			{Serial: "root", Path: c.image, ReadOnly: true}, {Serial: "modules", Path: c.pack.Modules, ReadOnly: true},
			{Serial: "data", Path: filepath.Join(dir, "data.img"), Discard: true},
		},
		Dir: filepath.Join(dir, "run"), ConsoleLog: filepath.Join(dir, "console.log"), VMMLog: filepath.Join(dir, "vmm.log"),
	}
}

// twin is a machine and the connection to it.
type twin struct {
	*testing.T
	spec  vmm.Spec
	vm    vmm.VM
	guest *guestconn.Conn
}

func (c *copier) twin(spec vmm.Spec, vm vmm.VM) *twin {
	w := &twin{T: c.t, spec: spec, vm: vm}
	c.t.Cleanup(func() {
		if c.t.Failed() {
			b, _ := os.ReadFile(spec.ConsoleLog)
			c.t.Logf("console of %s:\n%s", spec.ID, b[max(0, len(b)-4000):])
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := vm.Kill(ctx); err != nil {
			c.t.Error(err)
		}
		_ = vm.Close()
	})
	return w
}

// connect makes a new connection, as a hutchd does that has found the machine.
func (w *twin) connect() {
	w.guest = guestconn.New(guestconn.Params{Dial: w.vm.DialLink, Done: w.vm.Done()})
	w.Cleanup(func() { _ = w.guest.Close() })
}

func (c *copier) boot(name string) *twin {
	c.t.Helper()
	ctx, spec := testenv.Context(c.t), c.spec(name)
	if err := c.disks.Create(ctx, spec.Disks[2].Path, 512); err != nil {
		c.t.Fatal(err)
	}
	vm, err := c.driver.Launch(ctx, spec)
	if err != nil {
		c.t.Fatal(err)
	}
	w := c.twin(spec, vm)
	w.connect()
	return w
}

// save stops the machine and keeps what it is. The machine stays stopped.
func (c *copier) save(w *twin) (*snapshot.Snapshot, *os.File) {
	c.t.Helper()
	ctx := testenv.Context(c.t)
	if err := w.guest.Close(); err != nil {
		c.t.Error(err)
	}
	if err := w.vm.Pause(ctx); err != nil {
		c.t.Fatal(err)
	}
	draft, err := snapshot.Begin(filepath.Join(c.dir, "saved-"+string(w.spec.ID)))
	if err != nil {
		c.t.Fatal(err)
	}
	files := vmm.Files{State: c.memoryFile("state"), Memory: c.memoryFile("memory")}
	stats, err := w.vm.(vmm.Saver).Save(ctx, files)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.disks.Clone(ctx, w.spec.Disks[2].Path, draft.Data()); err != nil {
		c.t.Fatal(err)
	}
	s, err := draft.Publish(ctx, snapshot.Manifest{ID: string(w.spec.ID), Kind: snapshot.Named, Fits: snapshot.Fits{
		VMM: "qemu", VMMVersion: stats.Version, Machine: stats.Machine, Accel: stats.Accel, CPU: stats.CPU,
		KernelID: c.pack.ID, VCPUs: w.spec.VCPUs, MemoryMB: w.spec.MemoryMB,
	}}, files.State, files.Memory)
	if err != nil {
		c.t.Fatal(err)
	}
	memory, err := s.LoadMemory(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { memory.Close() })
	if err := snapshot.Seal(memory); err != nil {
		c.t.Fatal(err)
	}
	return s, memory
}

func (c *copier) memoryFile(name string) *os.File {
	c.t.Helper()
	f, err := snapshot.NewMemory(name, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { f.Close() })
	return f
}

func (c *copier) restore(name string, from *snapshot.Snapshot, memory *os.File) *twin {
	c.t.Helper()
	ctx, spec := testenv.Context(c.t), c.spec(name)
	state, err := from.CopyState(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	defer state.Close()
	if err := from.CopyData(ctx, spec.Disks[2].Path); err != nil {
		c.t.Fatal(err)
	}
	vm, err := c.driver.Restore(ctx, spec, vmm.Saved{State: state, Memory: memory})
	if err != nil {
		c.t.Fatal(err)
	}
	w := c.twin(spec, vm)
	w.connect()
	if err := vm.Resume(ctx); err != nil {
		c.t.Fatal(err)
	}
	return w
}

// configure makes the machine who it is; boot is empty for an original.
func (w *twin) configure(boot string) guestconn.Facts {
	w.Helper()
	began := time.Now()
	name := string(w.spec.ID)
	facts, err := w.guest.Configure(testenv.Context(w), guestconn.Config{
		ID: name, MachineID: fmt.Sprintf("%032x", name)[:32], BootID: boot, Env: map[string]string{"NAME": name},
	})
	if err != nil {
		w.Fatal(err)
	}
	w.Logf("%s: configured in %v", name, time.Since(began).Round(time.Millisecond))
	return facts
}

func (w *twin) sh(script string) string {
	w.Helper()
	res, err := w.guest.Exec(testenv.Context(w), guestconn.Exec{Cmd: "/bin/sh", Args: []string{"-c", script}, MaxOutput: 1 << 20})
	if err != nil || res.ExitCode != 0 {
		w.Fatalf("%s: %s: %v, exit code %d: %s", w.spec.ID, script, err, res.ExitCode, res.Stderr)
	}
	return string(res.Stdout)
}

// still checks that nothing can be started.
func (w *twin) still() {
	w.Helper()
	ctx, cancel := context.WithTimeout(testenv.Context(w), time.Second)
	defer cancel()
	if _, err := w.guest.Ready(testenv.Context(w)); err != nil {
		w.Fatal(err)
	}
	if res, err := w.guest.Exec(ctx, guestconn.Exec{Cmd: "/bin/touch", Args: []string{"/root/early"}}); !fault.Is(err, fault.Deadline) {
		w.Errorf("%s: a program was started in a still guest: %v, %v", w.spec.ID, res, err)
	}
}

// wallClock finds the time since the boot and what the wall clock is ahead of
// it, in what the kernel tells of its timers.
var wallClock = regexp.MustCompile(`(?s)now at (\d+) nsecs.*?ktime_get_real\s+\.offset:\s+(\d+) nsecs`)

// onTime checks that the guest's clock is within 100 ms of the host's, as far
// as a question and its answer can tell: the guest looks at its clock somewhere
// between them.
func (w *twin) onTime() {
	w.Helper()
	const near = 100 * time.Millisecond
	behind, ahead := -time.Hour, time.Hour // bounds of how far the guest is ahead
	for range 5 {
		asked := time.Now()
		timers := w.sh("cat /proc/timer_list") // the shell's tools tell whole seconds
		answered := time.Now()
		m := wallClock.FindStringSubmatch(timers)
		if m == nil {
			w.Fatalf("timers not understood:\n%s", timers)
		}
		now, err := strconv.ParseInt(m[1], 10, 64)
		offset, err2 := strconv.ParseInt(m[2], 10, 64)
		if err := errors.Join(err, err2); err != nil {
			w.Fatal(err)
		}
		guest := time.Unix(0, now+offset)
		behind, ahead = max(behind, guest.Sub(answered)), min(ahead, guest.Sub(asked))
	}
	w.Logf("%s: the clock is ahead by %v to %v", w.spec.ID, behind.Round(time.Millisecond), ahead.Round(time.Millisecond))
	if behind > near || ahead < -near {
		w.Errorf("%s: the clock is ahead by %v to %v", w.spec.ID, behind, ahead)
	}
}

// watch starts a program that notes, over and over, who it thinks that it is,
// and returns when it has done so.
const watch = `(while :; do
	echo "$(cat /proc/sys/kernel/random/boot_id) $(hostname) $(cat /etc/machine-id)" >>/root/seen
	sleep 0.05
done) >/dev/null 2>&1 &
until [ -s /root/seen ]; do sleep 0.05; done`

// aHook notes who it runs for.
const aHook = `mkdir -p /etc/hutch/restore.d
cat >/etc/hutch/restore.d/10-note <<'END'
#!/bin/sh
echo "$(cat /proc/sys/kernel/random/boot_id) $(hostname)" >>/root/hooks
wc -l </root/seen >/root/before
END
printf '#!/bin/sh\necho no such key >&2\nexit 3\n' >/etc/hutch/restore.d/20-fails
chmod 755 /etc/hutch/restore.d/*`

// TestMachinesThatAreCopied copies a running machine, and a copy of it again.
func TestMachinesThatAreCopied(t *testing.T) {
	c := newCopier(t)
	source := c.boot("source")
	born := source.configure("").BootID
	source.sh(aHook)
	source.sh(watch)
	source.sh("until [ -s /root/seen ]; do sleep 0.05; done")

	quiet, err := source.guest.Quiesce(testenv.Context(t))
	if err != nil || !slices.Contains(quiet.Frozen, "hutch") {
		t.Fatalf("quiesce: %+v, %v", quiet, err)
	}
	t.Logf("quiesced: %+v", quiet)
	source.still()
	again, err := source.guest.Quiesce(testenv.Context(t))
	if err != nil || cmp.Diff(quiet.Frozen, again.Frozen) != "" {
		t.Errorf("quiesced again: %+v, %v", again, err)
	}
	saved, memory := c.save(source)

	type twinID struct{ w, from, boot string }
	drawn := map[string]string{}
	random := func(w *twin) {
		t.Helper()
		x := w.sh("head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid")
		if other := drawn[x]; other != "" {
			t.Errorf("%s and %s drew the same randomness", w.spec.ID, other)
		}
		drawn[x] = string(w.spec.ID)
	}
	check := func(id twinID, from *snapshot.Snapshot, memory *os.File) *twin {
		t.Helper()
		w := c.restore(id.w, from, memory)
		w.still()
		facts := w.configure(id.boot)
		if facts.BootID != id.boot || cmp.Diff([]string{"restore hook 20-fails: exit code 3: no such key"}, facts.Warnings) != "" {
			t.Errorf("%s: %+v", id.w, facts)
		}
		w.onTime()
		who := fmt.Sprintf("%s %s %s", id.boot, id.w, fmt.Sprintf("%032x", id.w)[:32])
		if got := w.sh("tail -n1 /root/hooks; echo $NAME; ls /root/early 2>/dev/null; :"); got != fmt.Sprintf("%s %s\n%s\n", id.boot, id.w, id.w) {
			t.Errorf("%s: hook, environment and early programs: %q", id.w, got)
		}
		random(w)
		// The program goes on; one round may have been half-way.
		w.sh("until [ $(wc -l </root/seen) -gt $(($(cat /root/before) + 2)) ]; do sleep 0.05; done")
		for _, line := range strings.Fields(w.sh("tail -n +$(($(cat /root/before) + 2)) /root/seen | tr ' ' _ | sort -u")) {
			if line != strings.ReplaceAll(who, " ", "_") {
				t.Errorf("%s: a program saw %s", id.w, line)
			}
		}
		return w
	}
	a := check(twinID{"copy-a", "source", "aaaaaaaa-0000-4000-8000-000000000001"}, saved, memory)
	check(twinID{"copy-b", "source", "bbbbbbbb-0000-4000-8000-000000000002"}, saved, memory)

	// The original goes on as it was, and runs no hooks.
	if err := source.vm.Resume(testenv.Context(t)); err != nil {
		t.Fatal(err)
	}
	source.connect()
	source.still()
	if facts := source.configure(""); facts.BootID != born || len(facts.Warnings) != 0 {
		t.Errorf("source: %+v, born %s", facts, born)
	}
	source.onTime()
	random(source)
	if got := source.sh("ls /root; cut -d' ' -f1 /root/seen | sort -u"); got != "seen\n"+born+"\n" {
		t.Errorf("source: %q", got)
	}

	// A copy of a copy.
	if _, err := a.guest.Quiesce(testenv.Context(t)); err != nil {
		t.Fatal(err)
	}
	saved, memory = c.save(a)
	check(twinID{"copy-c", "copy-a", "cccccccc-0000-4000-8000-000000000003"}, saved, memory)
}

// TestAStillGuestWithoutHostGoesOn loses the host of a guest that is still.
func TestAStillGuestWithoutHostGoesOn(t *testing.T) {
	c := newCopier(t)
	w := c.boot("lonely")
	w.configure("")
	w.sh(watch)
	if _, err := w.guest.Quiesce(testenv.Context(t)); err != nil {
		t.Fatal(err)
	}
	w.still()
	if err := w.guest.Close(); err != nil {
		t.Error(err)
	}
	harness.Eventually(t, 2*time.Minute, func() error {
		b, err := os.ReadFile(w.spec.ConsoleLog)
		if err == nil && !strings.Contains(string(b), "its host did not come back") {
			err = fmt.Errorf("the guest is still")
		}
		return err
	})
	w.connect()
	w.sh("n=$(wc -l </root/seen); until [ $(wc -l </root/seen) -gt $n ]; do sleep 0.05; done")
}
