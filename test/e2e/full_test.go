package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// leaveFree fills a disk but for so many bytes.
func leaveFree(t *testing.T, disk string, free int64) {
	t.Helper()
	filler := filepath.Join(disk, "filler")
	if err := os.Remove(filler); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if take := int64(st.Bavail)*st.Bsize - free; take > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, take); err != nil {
			t.Fatalf("fill the disk: %v", err)
		}
	}
}

// create asks for a sandbox over the API and returns the code of the refusal
// and what it says, or nothing.
func create(t *testing.T, d *harness.Daemon, id string) (code, message string) {
	t.Helper()
	ask := fmt.Sprintf(`{"sandbox_id":%q,"memory_mb":128}`, id)
	res, err := http.Post("http://"+d.TCP+"/hostagent.v1.HostAgentService/CreateSandbox", "application/json", strings.NewReader(ask))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var refusal struct{ Code, Message string }
	if err := json.Unmarshal(b, &refusal); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return refusal.Code, refusal.Message
}

// nothingLeft fails the test when something of a sandbox is on the host. What
// was renamed to the trash is deleted a moment later.
func nothingLeft(t *testing.T, d *harness.Daemon) {
	t.Helper()
	if ids := d.Hutch("ls", "-q"); ids != "" {
		t.Errorf("hutchd lists %s", ids)
	}
	harness.Eventually(t, 10*time.Second, func() error {
		for _, pattern := range []string{d.Root + "/sandboxes/*", d.Root + "/sandboxes/.*", d.Root + "/trash/*", d.Root + "/blank/.*", d.RunDir + "/sandboxes/*"} {
			if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
				return fmt.Errorf("left behind: %v, %w", left, err)
			}
		}
		return nil
	})
}

// TestCreateOnAFullDisk creates while the disk of hutchd's root is so full
// that one step or the other fails.
func TestCreateOnAFullDisk(t *testing.T) {
	disk := testenv.SmallDisk(t, "400m")
	d := harness.Start(t, harness.Options{TCP: true, Disk: disk, Config: "[limits]\nmin_free_disk_mb = 0\n"})
	for _, step := range []struct {
		name string
		free int64
	}{{"record", 0}, {"blank image", 4 << 10}, {"data disk", 132 << 10}} {
		t.Run("no room for the "+step.name, func(t *testing.T) {
			leaveFree(t, disk, step.free)
			code, message := create(t, d, "no-room")
			if code != "resource_exhausted" || !strings.Contains(message, "disk is full; free space on it") || strings.Contains(message, "\n") {
				t.Errorf("%s: %q", code, message)
			}
			nothingLeft(t, d)
		})
	}
	t.Run("room again", func(t *testing.T) {
		leaveFree(t, disk, 64<<20)
		if code, message := create(t, d, "no-room"); code != "" {
			t.Errorf("%s: %q", code, message)
		}
		if got := d.Hutch("exec", "no-room", "--", "echo", "here"); got != "here" {
			t.Errorf("got %q", got)
		}
		d.Hutch("rm", "no-room")
		nothingLeft(t, d)
	})
}

// TestCreateKeepsDiskFree is refused before the disk is full, unless told
// otherwise.
func TestCreateKeepsDiskFree(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true, Disk: testenv.SmallDisk(t, "400m")})
	if code, message := create(t, d, "no-room"); code != "resource_exhausted" || !strings.Contains(message, "512 must stay") {
		t.Errorf("%s: %q", code, message)
	}
	if r := d.Try("create", "-m", "128"); r.Code != 125 || !strings.Contains(r.Stderr, "no disk space") || !strings.Contains(r.Stderr, "later") {
		t.Errorf("%+v", r)
	}
	nothingLeft(t, d)
}

// TestGuestFillsTheHostsDisk writes more in a guest than the host has, though
// its own disk has room: the guest stands until there is room, loses nothing,
// and nobody else notices.
func TestGuestFillsTheHostsDisk(t *testing.T) {
	disk := testenv.SmallDisk(t, "400m")
	d := harness.Start(t, harness.Options{TCP: true, Disk: disk, Config: "[limits]\nmin_free_disk_mb = 0\n"})
	greedy, other := d.Create("-m", "128"), d.Create("-m", "128")
	leaveFree(t, disk, 16<<20)
	const fill = "(yes $(seq 1 1000) | head -c 67108864 > /root/f; sync; echo $? > /root/end) >/dev/null 2>&1 &"
	d.Hutch("exec", greedy, "--", "setsid", "sh", "-c", fill)
	stands := func() { t.Helper(); wantStatus(t, d, greedy, "paused", "disk is full") }
	stands()
	leaveFree(t, disk, 0)
	if r := d.Try("exec", greedy, "--", "true"); r.Code == 0 || !strings.Contains(r.Stderr, "paused") {
		t.Errorf("exec in a guest that stands: %+v", r)
	}
	if got := d.Hutch("exec", other, "--", "echo", "here"); got != "here" {
		t.Errorf("the other says %q", got)
	}
	d.Hutch("pause", other)
	d.Hutch("resume", other)
	d.Hutch("resume", greedy) // tries, and stands again
	stands()
	d.Down(syscall.SIGTERM)
	d.Up()
	wantStatus(t, d, other, "running", "")
	stands()
	d.Hutch("rm", other)

	leaveFree(t, disk, 160<<20)
	harness.Eventually(t, 2*time.Minute, func() error {
		if r := d.Try("exec", greedy, "--", "cat", "/root/end"); r.Code != 0 || strings.TrimSpace(r.Stdout) != "0" {
			return fmt.Errorf("it does not go on: %+v", r)
		}
		return nil
	})
	want := d.Hutch("exec", greedy, "--", "sh", "-c", "yes $(seq 1 1000) | head -c 67108864 | sha256sum")
	if got := d.Hutch("exec", greedy, "--", "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/f"); got != want {
		t.Errorf("what it wrote has digest %s, want %s", got, want)
	}
	d.Hutch("rm", greedy)
	nothingLeft(t, d)
}
