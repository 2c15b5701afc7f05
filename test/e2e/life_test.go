package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// record is what these tests read of hutch inspect.
type record struct {
	Info struct {
		Status string `json:"status"`
		Reason string `json:"reason"`
		HostIP string `json:"host_ip"`
	} `json:"info"`
	VMMPid   int    `json:"vmm_pid"`
	Boots    int    `json:"boots"`
	BootID   string `json:"boot_id"`
	Snapshot string `json:"snapshot_id"`
	Parent   string `json:"parent_sandbox_id"`
	Then     string `json:"on_timeout"`
	Auto     bool   `json:"auto_resume"`
	Stages   []struct {
		Name string `json:"name"`
	} `json:"create_stages"`
}

func inspect(t *testing.T, d *harness.Daemon, id string) record {
	t.Helper()
	var r record
	if err := json.Unmarshal([]byte(d.Hutch("inspect", id)), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func wantStatus(t *testing.T, d *harness.Daemon, id, status, reason string) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, func() error {
		if r := d.Try("inspect", id); r.Code != 0 {
			return errors.New(r.Stderr)
		}
		if r := inspect(t, d, id); r.Info.Status != status || !strings.Contains(r.Info.Reason, reason) {
			return fmt.Errorf("%s is %s (%s), want %s (%s)", id, r.Info.Status, r.Info.Reason, status, reason)
		}
		return nil
	})
}

func TestSandboxesOutliveTheirDaemon(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	running := d.Create("-m", "128", "--id", "keeps-running")
	paused := d.Create("-m", "128", "--id", "stays-paused")
	d.Hutch("pause", paused)
	d.Hutch("exec", running, "--", "sh", "-c", "echo kept > /root/file; (while :; do date +%s > /tmp/new; mv /tmp/new /tmp/alive; sleep 1; done) >/dev/null 2>&1 &")
	before := inspect(t, d, running)
	for name, signal := range map[string]os.Signal{"killed": syscall.SIGKILL, "stopped": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			d.Down(signal)
			d.Up()
			after := inspect(t, d, running)
			if after.VMMPid != before.VMMPid || after.Boots != 1 || after.Info.HostIP != before.Info.HostIP {
				t.Errorf("before %+v, after %+v", before, after)
			}
			if got := d.Hutch("exec", running, "--", "cat", "/root/file"); got != "kept" {
				t.Errorf("file says %q", got)
			}
			if r := d.Try("exec", running, "--", "sh", "-c", "a=$(cat /tmp/alive); sleep 3; test $(cat /tmp/alive) -gt $a"); r.Code != 0 {
				t.Errorf("the background program stands still: %+v", r)
			}
			wantStatus(t, d, paused, "paused", "")
		})
	}
	d.Hutch("resume", paused)
	if got := d.Hutch("exec", paused, "--", "echo", "here"); got != "here" {
		t.Errorf("resumed sandbox says %q", got)
	}
}

func TestDaemonCanTakeItsVMsAlong(t *testing.T) {
	d := harness.Start(t, harness.Options{Args: []string{"--stop-vms"}})
	id := d.Create("-m", "128")
	d.Hutch("exec", id, "--", "sh", "-c", "echo kept > /root/file; sync")
	pid := inspect(t, d, id).VMMPid
	d.Down(syscall.SIGTERM)
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("VMM %d after the stop: %v", pid, err)
	}
	d.Up()
	wantStatus(t, d, id, "stopped", "")
	d.Hutch("resume", id)
	if got := d.Hutch("exec", id, "--", "cat", "/root/file"); got != "kept" {
		t.Errorf("file says %q", got)
	}
}

// TestDeaths ends machines in every way and boots them again from their disks.
func TestDeaths(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := d.Create("-m", "128")
	boots := 1
	for _, c := range []struct {
		name           string
		kill           func()
		status, reason string
	}{
		{"VMM killed", func() { syscall.Kill(inspect(t, d, id).VMMPid, syscall.SIGKILL) }, "error", "SIGKILL"},
		{"kernel panics", func() { d.Try("exec", "--timeout", "20s", id, "--", "sh", "-c", "echo c > /proc/sysrq-trigger") }, "error", "panic"},
		{"guest powers off", func() { d.Try("exec", "--timeout", "20s", id, "--", "poweroff") }, "stopped", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d.Hutch("exec", id, "--", "sh", "-c", "echo "+fmt.Sprint(boots)+" > /root/file; sync")
			c.kill()
			wantStatus(t, d, id, c.status, c.reason)
			if r := d.Try("exec", id, "--", "true"); r.Code != 125 || !strings.Contains(r.Stderr, c.status) {
				t.Errorf("exec in a dead sandbox: %+v", r)
			}
			d.Hutch("resume", id)
			if got := d.Hutch("exec", id, "--", "cat", "/root/file"); got != fmt.Sprint(boots) {
				t.Errorf("file says %q, want %d", got, boots)
			}
			boots++
			if got := inspect(t, d, id).Boots; got != boots {
				t.Errorf("%d boots, want %d", got, boots)
			}
		})
	}
	t.Run("agent dies", func(t *testing.T) {
		server := "ps | awk '/[h]utch-agent serve/ {print $1}'"
		before := d.Hutch("exec", id, "--", "sh", "-c", server)
		d.Try("exec", id, "--", "kill", "-9", before)
		harness.Eventually(t, time.Minute, func() error {
			if r := d.Try("exec", id, "--", "hostname"); r.Stdout != id+"\n" {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
		if after := d.Hutch("exec", id, "--", "sh", "-c", server); after == before || after == "" {
			t.Errorf("the server was %s and is %s", before, after)
		}
		if got := inspect(t, d, id); got.Boots != boots || got.Info.Status != "running" {
			t.Errorf("%+v", got)
		}
	})
}

func TestIdleSandboxIsDestroyed(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := d.Create("-m", "128", "--idle", "4s")
	// In flight for longer than the limit: not inactive.
	if got := d.Hutch("exec", id, "--", "sh", "-c", "sleep 9; echo alive"); got != "alive" {
		t.Errorf("got %q", got)
	}
	if got := d.Hutch("wait", "--for", "gone", id); got != "gone" {
		t.Errorf("waited for gone, got %q", got)
	}
	if events := d.Hutch("events", "--no-follow"); !strings.Contains(events, "ttl") {
		t.Errorf("no event says ttl:\n%s", events)
	}
}

// TestTwentyAtOnce creates twenty sandboxes at the same time: each is made, or
// refused with an error that says to try again.
func TestTwentyAtOnce(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	var wg sync.WaitGroup
	results := make([]harness.Result, 20)
	for i := range results {
		wg.Go(func() { results[i] = d.Try("create", "-m", "128", "--id", fmt.Sprintf("many-%d", i)) })
	}
	wg.Wait()
	made := 0
	for i, r := range results {
		switch {
		case r.Code == 0:
			made++
			if got := d.Try("exec", fmt.Sprintf("many-%d", i), "--", "hostname"); got.Stdout != fmt.Sprintf("many-%d\n", i) {
				t.Errorf("many-%d: %+v", i, got)
			}
		case !strings.Contains(r.Stderr, "no room"):
			t.Errorf("many-%d: %+v", i, r)
		}
	}
	t.Logf("%d of 20 made", made)
	if made == 0 {
		t.Error("none was made")
	}
}

// TestInterruptedCreates leaves and destroys sandboxes while they are made.
func TestInterruptedCreates(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	t.Run("the client leaves", func(t *testing.T) {
		c := d.Command(testenv.Context(t), "create", "-m", "128", "--id", "left-alone")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		wantStatus(t, d, "left-alone", "pending", "")
		c.Process.Kill()
		c.Wait()
		d.Hutch("wait", "--for", "running", "left-alone")
		if got := d.Hutch("exec", "left-alone", "--", "echo", "usable"); got != "usable" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("destroyed while pending", func(t *testing.T) {
		c := d.Command(testenv.Context(t), "create", "-m", "128", "--id", "cut-short")
		var said strings.Builder
		c.Stderr = &said
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, 30*time.Second, func() error {
			if r := d.Try("inspect", "cut-short"); r.Code != 0 {
				return errors.New(r.Stderr)
			}
			return nil
		})
		d.Hutch("rm", "cut-short")
		err := c.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || !strings.Contains(said.String(), "destroyed") {
			t.Errorf("create ended with %v: %s", err, said.String())
		}
		if r := d.Try("inspect", "cut-short"); r.Code == 0 {
			t.Errorf("still there: %s", r.Stdout)
		}
	})
	t.Run("the daemon is killed while pending", func(t *testing.T) {
		c := d.Command(testenv.Context(t), "create", "-m", "128", "--id", "orphan")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		wantStatus(t, d, "orphan", "pending", "")
		d.Down(syscall.SIGKILL)
		c.Wait()
		d.Up()
		if r := d.Try("inspect", "orphan"); r.Code == 0 {
			t.Errorf("half a sandbox: %s", r.Stdout)
		}
	})
	t.Run("the same create again", func(t *testing.T) {
		if again := d.Create("-m", "128", "--id", "left-alone"); again != "left-alone" {
			t.Errorf("got %s", again)
		}
		if r := d.Try("create", "-m", "256", "--id", "left-alone"); r.Code != 125 || !strings.Contains(r.Stderr, "left-alone") {
			t.Errorf("another spec: %+v", r)
		}
	})
}

// TestDiskTrim deletes a file in the guest and sees the host's file shrink.
func TestDiskTrim(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	id := d.Create("-m", "128")
	disk := filepath.Join(d.Root, "sandboxes", id, "data.img")
	allocated := func() int64 {
		fi, err := os.Stat(disk)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t).Blocks * 512
	}
	const size = 200 << 20
	d.Hutch("exec", "--timeout", "3m", id, "--", "sh", "-c", "dd if=/dev/urandom of=/root/f bs=1M count=200 2>/dev/null; sync")
	full := allocated()
	d.Hutch("exec", id, "--", "sh", "-c", "rm /root/f; sync")
	res, err := http.Post("http://"+d.TCP+"/sandboxes/"+id+"/arcbox.v1.AgentService/DiskTrim", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(b), "bytesTrimmed") {
		t.Fatalf("trim: %s, %v", b, err)
	}
	if after := allocated(); full-after < size*9/10 {
		t.Errorf("the host's file had %d bytes, and has %d after the trim", full, after)
	}
}
