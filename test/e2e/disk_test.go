package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hutch-run/hutch/test/harness"
)

// TestStoppedDiskIsClean stops a sandbox in every orderly way, in the middle
// of writing, and looks at its disk: unmounted, without an error and without
// a journal to replay. It stops one disk again and again, so each way has the
// others' leavings below it, and those of a machine that was killed.
func TestStoppedDiskIsClean(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true, Args: []string{"--stop-vms"}})
	id := d.Create("-m", "128")
	keepWriting(t, d, id, "0")
	if err := syscall.Kill(inspect(t, d, id).VMMPid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, d, id, "error", "")
	if faults := diskFaults(t, d, id); faults == "" {
		t.Error("the disk of a machine that was killed while it wrote looks clean: the check sees nothing")
	}
	last := ""
	for i, way := range []struct {
		name string
		stop func(t *testing.T)
	}{
		{"poweroff in the guest", func(t *testing.T) { d.Try("exec", "--timeout", "20s", id, "--", "poweroff") }},
		{"halt in the guest", func(t *testing.T) { d.Try("exec", "--timeout", "20s", id, "--", "halt") }},
		{"reboot in the guest", func(t *testing.T) { d.Try("exec", "--timeout", "20s", id, "--", "reboot") }},
		{"asked over the API", func(t *testing.T) { shutDown(t, d, id) }},
		{"hutchd stops its machines", func(t *testing.T) { d.Down(syscall.SIGTERM); d.Up() }},
		{"the same while paused", func(t *testing.T) { d.Hutch("pause", id); d.Down(syscall.SIGTERM); d.Up() }},
	} {
		t.Run(way.name, func(t *testing.T) {
			d.Hutch("resume", id)
			if got := d.Hutch("exec", id, "--", "sh", "-c", "cat /root/last 2>/dev/null || true"); last != "" && got != last {
				t.Errorf("what was written before the last stop, without a sync: %q, want %q", got, last)
			}
			last = fmt.Sprint(i + 1)
			keepWriting(t, d, id, last)
			way.stop(t)
			wantStatus(t, d, id, "stopped", "")
			if faults := diskFaults(t, d, id); faults != "" {
				t.Error(faults)
			}
		})
	}
}

// keepWriting leaves files that nothing has written back yet, and a writer
// that is never done in Docker's part of the disk.
func keepWriting(t *testing.T, d *harness.Daemon, id, mark string) {
	t.Helper()
	d.Hutch("exec", id, "--", "sh", "-ec", `
		grep -q ' /var/lib/docker ' /proc/mounts
		mkdir -p /root/d`+mark+` && cd /root/d`+mark+` && seq 1 300 | while read n; do echo $n > f$n; done; rm f1*
		(while :; do dd if=/dev/zero of=/var/lib/docker/f bs=64k count=64; rm /var/lib/docker/f; done) >/dev/null 2>&1 &
		echo `+mark+` > /root/last`)
}

// shutDown asks the guest for its end.
func shutDown(t *testing.T, d *harness.Daemon, id string) {
	t.Helper()
	res, err := http.Post("http://"+d.TCP+"/sandboxes/"+id+"/arcbox.v1.AgentService/Shutdown", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("shutdown: %s, %s, %v", res.Status, b, err)
	}
}

// diskFaults tells what is wrong with the disk of a sandbox that has stopped.
// It only reads.
func diskFaults(t *testing.T, d *harness.Daemon, id string) string {
	t.Helper()
	disk := filepath.Join(d.Root, "sandboxes", id, "data.img")
	if out, err := exec.Command("e2fsck", "-fn", disk).CombinedOutput(); err != nil {
		return fmt.Sprintf("e2fsck: %v\n%s", err, out)
	}
	head, err := exec.Command("dumpe2fs", "-h", disk).Output()
	if err != nil {
		t.Fatalf("dumpe2fs: %v", err)
	}
	for line := range strings.Lines(string(head)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		if key == "Filesystem state" && value != "clean" || key == "Filesystem features" && strings.Contains(value, "needs_recovery") {
			return fmt.Sprintf("%s: %s", key, value)
		}
	}
	return ""
}
