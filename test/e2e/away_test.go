package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/test/harness"
)

// ended waits for the end of a process that may stay as a zombie: its parent
// is gone, and the init of a container need not reap.
func ended(t *testing.T, pid int) {
	t.Helper()
	harness.Eventually(t, time.Minute, func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		// The name before the state is in brackets and may hold anything.
		if _, state, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " "); strings.HasPrefix(state, "Z") {
			return nil
		}
		return fmt.Errorf("process %d is alive: %v", pid, err)
	})
}

// TestDeathsWhileTheDaemonIsAway ends machines while no hutchd runs. The next
// one tells a guest that powered off from a VMM that died, and boots each again
// from its disk.
func TestDeathsWhileTheDaemonIsAway(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	type life struct{ id, later, status, reason string }
	lives := []life{
		{"powers-off", "poweroff", "stopped", "while hutchd was not running: guest powered off"},
		{"panics", "echo c > /proc/sysrq-trigger", "stopped", "or its kernel panicked"},
		{"is-killed", "", "error", "while hutchd was not running: crashed"},
		{"lives-on", "", "running", ""},
	}
	pids := map[string]int{}
	for _, l := range lives {
		d.Create("-m", "128", "--id", l.id)
		pids[l.id] = inspect(t, d, l.id).VMMPid
		d.Hutch("exec", l.id, "--", "sh", "-c", "echo kept > /root/file; sync")
	}
	for _, l := range lives {
		if l.later != "" {
			d.Hutch("exec", l.id, "--", "sh", "-c", "(sleep 4; "+l.later+") >/dev/null 2>&1 &")
		}
	}
	d.Down(syscall.SIGKILL)
	for _, l := range lives {
		switch {
		case l.status == "running":
			continue
		case l.later == "":
			if err := syscall.Kill(pids[l.id], syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		ended(t, pids[l.id])
	}
	d.Up()
	for range 2 { // and the one after it says the same
		for _, l := range lives {
			wantStatus(t, d, l.id, l.status, l.reason)
		}
		d.Down(syscall.SIGKILL)
		d.Up()
	}
	for _, l := range lives {
		d.Hutch("resume", l.id)
		if got := d.Hutch("exec", l.id, "--", "cat", "/root/file"); got != "kept" {
			t.Errorf("%s: file says %q", l.id, got)
		}
	}
}
