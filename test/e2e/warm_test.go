package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// clones is how many copies of one machine run side by side.
const clones = 12

// TestClonesAreNobodysTwin makes many copies of one warm template, and looks
// for anything that two of them share but must not.
func TestClonesAreNobodysTwin(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := strings.TrimSpace(d.Hutch("template", "warm", "minimal", "-m", "128"))
	if again := strings.TrimSpace(d.Hutch("template", "warm", "minimal", "-m", "128")); again != id {
		t.Errorf("warm already, and made again: %s after %s", again, id)
	}
	var wg sync.WaitGroup
	for i := range clones {
		wg.Go(func() { d.Create("-m", "128", "--id", fmt.Sprintf("clone-%d", i)) })
	}
	wg.Wait()
	facts := map[string]map[string]string{}
	for i := range clones {
		box := fmt.Sprintf("clone-%d", i)
		r := inspect(t, d, box)
		if r.Snapshot != id {
			t.Errorf("%s was made from %q, not from %s", box, r.Snapshot, id)
		}
		out := strings.Split(strings.TrimSpace(d.Hutch("exec", box, "--", "sh", "-c",
			"head -c 32 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/uuid; head -c 16 /dev/random | sha256sum")), "\n")
		names := []string{"urandom", "boot id", "machine id", "host name", "uuid", "random"}
		if len(out) != len(names) {
			t.Fatalf("%s says %q", box, out)
		}
		if out[1] != r.BootID || out[3] != box {
			t.Errorf("%s is called %q, of boot %q; its record says %q", box, out[3], out[1], r.BootID)
		}
		for n, name := range names {
			if other := facts[name][out[n]]; other != "" {
				t.Errorf("%s and %s have the same %s: %s", box, other, name, out[n])
			}
			if facts[name] == nil {
				facts[name] = map[string]string{}
			}
			facts[name][out[n]] = box
		}
	}
	oneWritesAll(t, d, id)
}

// oneWritesAll has a clone write more memory than it has, and looks at what it
// shares it with.
func oneWritesAll(t *testing.T, d *harness.Daemon, id string) {
	t.Helper()
	before := d.Hutch("exec", "clone-1", "--", "sh", "-c", "cat /bin/busybox /lib/*/*.so* 2>/dev/null | sha256sum")
	d.Try("exec", "clone-0", "--", "dd", "if=/dev/urandom", "of=/dev/shm/all", "bs=1M", "count=200")
	if after := d.Hutch("exec", "clone-1", "--", "sh", "-c", "cat /bin/busybox /lib/*/*.so* 2>/dev/null | sha256sum"); after != before {
		t.Errorf("another clone reads %q, before it read %q", after, before)
	}
	snap, err := snapshot.Open(filepath.Join(d.Root, "snapshots", id))
	if err != nil {
		t.Fatal(err)
	}
	if err := snap.Verify(testenv.Context(t)); err != nil {
		t.Error(err)
	}
	if box := d.Create("-m", "128", "--id", "late"); inspect(t, d, box).Snapshot != id {
		t.Error("no copy was made any more")
	}
	d.Hutch("exec", "late", "--", "true")
}

// TestWarmTemplatesOutliveTheirDaemon kills hutchd, and copies what the one
// before has booted.
func TestWarmTemplatesOutliveTheirDaemon(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := strings.TrimSpace(d.Hutch("template", "warm", "minimal", "-m", "128"))
	first := d.Create("-m", "128", "--id", "first")
	d.Down(syscall.SIGKILL)
	d.Up()
	second := d.Create("-m", "128", "--id", "second")
	for _, box := range []string{first, second} {
		if r := inspect(t, d, box); r.Snapshot != id {
			t.Errorf("%s was made from %q", box, r.Snapshot)
		}
		d.Hutch("exec", box, "--", "true")
	}
	cold := d.Create("-m", "128", "--id", "cold", "--cold")
	if r := inspect(t, d, cold); r.Snapshot != "" {
		t.Errorf("asked to boot, it was made from %q", r.Snapshot)
	}
}

// TestShapesBecomeWarm creates a sandbox, and waits until others are copies, and
// then spares.
func TestShapesBecomeWarm(t *testing.T) {
	d := harness.Start(t, harness.Options{AutoWarm: true})
	if r := inspect(t, d, d.Create("-m", "128")); r.Snapshot != "" {
		t.Errorf("the first was made from %q", r.Snapshot)
	}
	for _, stage := range []string{"restore", "spare"} {
		harness.Eventually(t, time.Minute, func() error {
			box := d.Create("-m", "128")
			r := inspect(t, d, box)
			d.Hutch("exec", box, "--", "sh", "-c", "test $(hostname) = "+box)
			d.Hutch("rm", box)
			for _, s := range r.Stages {
				if s.Name == stage {
					return nil
				}
			}
			return fmt.Errorf("made in the stages %v", r.Stages)
		})
	}
}

// TestHibernate puts a sandbox to sleep and wakes it, again and again, with a
// hutchd killed in between, and looks at everything that must come back.
func TestHibernate(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	box := d.Create("-m", "160", "--id", "sleeper")
	ip := inspect(t, d, box).Info.HostIP
	d.Hutch("exec", box, "--", "sh", "-c", `
		dd if=/dev/urandom of=/dev/shm/pattern bs=1M count=30 2>/dev/null; sha256sum /dev/shm/pattern > /dev/shm/sum
		echo kept > /root/file
		(i=0; while :; do i=$((i+1)); echo $i > /tmp/count.new; mv /tmp/count.new /tmp/count; sleep 0.2; done) > /dev/null 2>&1 &
	`)
	for round := range 4 {
		count := d.Hutch("exec", box, "--", "cat", "/tmp/count")
		pid := inspect(t, d, box).VMMPid
		if round == 1 {
			d.Hutch("pause", box)
		}
		d.Hutch("hibernate", box)
		wantStatus(t, d, box, "hibernated", "")
		ended(t, pid)
		if round == 2 {
			d.Down(syscall.SIGKILL)
			d.Up()
		}
		if r := d.Try("exec", box, "--", "true"); r.Code == 0 {
			t.Error("a program ran in a sandbox that sleeps")
		}
		d.Hutch("resume", box)
		r := inspect(t, d, box)
		if r.Info.Status != "running" || r.Info.HostIP != ip {
			t.Errorf("round %d: it woke %s at %s, was at %s", round, r.Info.Status, r.Info.HostIP, ip)
		}
		d.Hutch("exec", box, "--", "sh", "-c", "cd /dev/shm && sha256sum -c sum && grep -q kept /root/file")
		harness.Eventually(t, 20*time.Second, func() error {
			if now := d.Hutch("exec", box, "--", "cat", "/tmp/count"); now == count {
				return fmt.Errorf("round %d: the program in the background stands at %s", round, now)
			}
			return nil
		})
	}
	d.Hutch("exec", box, "--", "poweroff")
	wantStatus(t, d, box, "stopped", "")
	if faults := diskFaults(t, d, box); faults != "" {
		t.Errorf("its disk: %s", faults)
	}
}
