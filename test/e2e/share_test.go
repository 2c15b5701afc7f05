package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
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

// A writable share's owner on the host.
const shareUID, shareGID = 64011, 64012

// sharing is a daemon that shares what is below dir/srv: rw, of a user, and ro,
// of root.
func sharing(t *testing.T) (d *harness.Daemon, dir string) {
	t.Helper()
	testenv.RequireRoot(t)
	dir = t.TempDir()
	for _, p := range []string{dir, filepath.Dir(dir)} { // as whoever the guest acts
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"srv/rw", "srv/ro", "out"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir+"/srv/rw/file", "from the host\n", shareUID, 0o640)
	write(t, dir+"/srv/ro/file", "read me\n", 0, 0o644)
	write(t, dir+"/srv/ro/secret", "not you\n", 0, 0o600)
	if err := os.Chown(dir+"/srv/rw", shareUID, shareGID); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../out", dir+"/srv/link"); err != nil {
		t.Fatal(err)
	}
	d = harness.Start(t, harness.Options{TCP: true, Config: fmt.Sprintf("[shares]\nallow = [%q]\n", dir+"/srv")})
	return d, dir
}

func write(t *testing.T, path, text string, uid int, mode os.FileMode) {
	t.Helper()
	gid := 0
	if uid == shareUID {
		gid = shareGID
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, uid, gid); err != nil {
		t.Fatal(err)
	}
}

// TestShares has a sandbox with two directories of the host, from its creation
// over a kill of hutchd and a boot to its end.
func TestShares(t *testing.T) {
	d, dir := sharing(t)
	refusedShares(t, d, dir)
	id := createSharing(t, d, dir)
	sh := func(script string) string {
		t.Helper()
		return d.Hutch("exec", id, "--", "sh", "-c", script)
	}
	t.Run("the guest reads and writes", func(t *testing.T) { readAndWrite(t, sh, dir) })
	t.Run("nothing else of the host is there", func(t *testing.T) { noEscape(t, d, id, sh, dir) })
	t.Run("MmapReadFile", func(t *testing.T) { mapFiles(t, d, id, sh, dir) })
	t.Run("what would write its memory down", func(t *testing.T) {
		for _, args := range [][]string{{"hibernate", id}, {"fork", id}, {"snapshot", "create", id, "snap"}} {
			if r := d.Try(args...); r.Code == 0 || !strings.Contains(r.Stderr, "a sandbox with shares can't be") {
				t.Errorf("%q: %+v", args, r)
			}
		}
		d.Hutch("pause", id)
		d.Hutch("resume", id)
	})
	d.Down(syscall.SIGKILL)
	d.Up()
	if got := sh("cat /mnt/rw/file"); got != "from the host" {
		t.Errorf("after a kill of hutchd: %q", got)
	}
	t.Run("a boot serves them anew", func(t *testing.T) { bootAgain(t, d, id, sh, dir) })
	t.Run("a server that ends", func(t *testing.T) { loseShare(t, d, id, sh) })
	d.Hutch("rm", id)
	if left := traces(t, id); len(left) != 0 {
		t.Errorf("left of it: %q", left)
	}
}

func refusedShares(t *testing.T, d *harness.Daemon, dir string) {
	t.Helper()
	for share, want := range map[string]string{
		dir + "/out:/mnt/x:ro":      "is not below a directory that this host shares",
		dir + "/srv/link:/mnt/x:ro": "is not below a directory that this host shares",
		dir + "/srv/ro:/mnt/x":      "belongs to root",
		dir + "/srv/none:/mnt/x":    "no such file",
		dir + "/srv/rw:/etc/x":      "belongs to the sandbox's system",
		d.Root + ":/mnt/x:ro":       "never shared",
	} {
		if r := d.Try("create", "-m", "128", "--share", share); r.Code == 0 || !strings.Contains(r.Stderr, want) {
			t.Errorf("%s: %+v, want %q", share, r, want)
		}
	}
}

// createSharing makes the sandbox by the API, which has the test features.
func createSharing(t *testing.T, d *harness.Daemon, dir string) string {
	t.Helper()
	id := fmt.Sprintf("shares-%d", os.Getpid())
	body := fmt.Sprintf(`{"sandbox_id":%q,"memory_mb":192,"test_features":true,"shares":[{"host_path":%q,"guest_path":"/mnt/rw"},{"host_path":%q,"guest_path":"/mnt/deep/ro","read_only":true}]}`,
		id, dir+"/srv/rw", dir+"/srv/ro")
	res, err := http.Post("http://"+d.TCP+"/hostagent.v1.HostAgentService/CreateSandbox", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
		t.Fatalf("create: %s: %s", res.Status, b)
	}
	return id
}

func readAndWrite(t *testing.T, sh func(string) string, dir string) {
	if got := sh("cat /mnt/rw/file /mnt/deep/ro/file; stat -c '%u:%g %a' /mnt/rw /mnt/rw/file"); got != "from the host\nread me\n0:0 755\n0:0 640" {
		t.Errorf("it reads %q", got)
	}
	sh("umask 022; echo back > /mnt/rw/new && mkdir /mnt/rw/dir && echo his > /mnt/rw/dir/his && chown 7:8 /mnt/rw/dir/his && mv /mnt/rw/dir/his /mnt/rw/his && sync")
	for name, want := range map[string]string{"new": "back\n 64011:64012 644", "his": "his\n 1900000006:1900000007 644"} {
		b, err := os.ReadFile(filepath.Join(dir, "srv/rw", name))
		var st unix.Stat_t
		if err == nil {
			err = unix.Stat(filepath.Join(dir, "srv/rw", name), &st)
		}
		if got := fmt.Sprintf("%s %d:%d %o", b, st.Uid, st.Gid, st.Mode&0o7777); err != nil || got != want {
			t.Errorf("%s on the host: %q, %v; want %q", name, got, err, want)
		}
	}
	for _, script := range []string{"echo x > /mnt/deep/ro/x", "rm /mnt/deep/ro/file", "chmod 777 /mnt/deep/ro", "mount -o remount,rw /mnt/deep/ro && echo x > /mnt/deep/ro/x", "cat /mnt/deep/ro/secret", "mknod /mnt/rw/null c 1 3"} {
		if got := sh("(" + script + ") >/dev/null 2>&1 && echo done || echo refused"); got != "refused" {
			t.Errorf("%q: %s", script, got)
		}
	}
	if b, err := os.ReadFile(dir + "/srv/ro/file"); err != nil || string(b) != "read me\n" {
		t.Errorf("the read-only file: %q, %v", b, err)
	}
}

// noEscape has links that the guest made, and links that were there, lead to the
// guest's own files.
func noEscape(t *testing.T, d *harness.Daemon, id string, sh func(string) string, dir string) {
	write(t, dir+"/out/secret", "of the host\n", 0, 0o644)
	for name, target := range map[string]string{"abs": "/etc/hostname", "up": "../../../../../../../etc/hostname", "gone": dir + "/out/secret"} {
		if err := os.Symlink(target, filepath.Join(dir, "srv/rw", name)); err != nil {
			t.Fatal(err)
		}
	}
	if got := sh("ln -s /etc /mnt/rw/etc; cat /mnt/rw/etc/hostname /mnt/rw/abs /mnt/rw/up"); got != strings.TrimSuffix(strings.Repeat(id+"\n", 3), "\n") {
		t.Errorf("links show %q", got)
	}
	for _, path := range []string{"/mnt/rw/gone", "/mnt/rw/../../" + dir + "/out/secret", "/mnt/rw/.././out/secret"} {
		if r := d.Try("exec", id, "--", "cat", path); r.Code == 0 {
			t.Errorf("%s shows %q", path, r.Stdout)
		}
	}
}

// mapFiles reads by mappings: case 18 of the acceptance list.
func mapFiles(t *testing.T, d *harness.Daemon, id string, sh func(string) string, dir string) {
	const size = 2<<20 + 5
	content := bytes.Repeat([]byte("0123456789abcde\n"), size/16+1)[:size]
	write(t, dir+"/srv/rw/big", string(content), shareUID, 0o644)
	sh("head -c 10000 /mnt/rw/big > /root/plain")
	for _, c := range []struct {
		path           string
		offset, length uint64
		want           []byte
	}{
		{"/mnt/rw/big", 0, size, content}, {"/mnt/rw/big", 4097, 5000, content[4097 : 4097+5000]},
		{"/mnt/rw/big", size - 3, 100, content[size-3:]}, {"/mnt/rw/big", size, 1, nil}, {"/mnt/rw/big", size + 1<<20, 1, nil},
		{"/mnt/rw/big", 1, 0, nil}, {"/mnt/rw/big", 1<<63 + 1, 1, nil}, {"/mnt/deep/ro/file", 0, 1 << 20, []byte("read me\n")},
		{"/root/plain", 9999, 1 << 20, content[9999:10000]}, {"/root/plain", 1, 4096, content[1:4097]}, {"/root/plain", 10000, 1, nil},
		{"/root/plain", 0, 0, nil},
	} {
		got, class := mmapRead(t, d, id, c.path, c.offset, c.length)
		if class != "" || sha256.Sum256(got) != sha256.Sum256(c.want) {
			t.Errorf("%s from %d, %d bytes: %d bytes, want %d; %s", c.path, c.offset, c.length, len(got), len(c.want), class)
		}
	}
	for path, want := range map[string]string{"/mnt/rw/none": "not_found", "/mnt/rw": "failed_precondition", "mnt/rw/big": "invalid_argument"} {
		if _, class := mmapRead(t, d, id, path, 0, 1); class != want {
			t.Errorf("%s: %q, want %q", path, class, want)
		}
	}
	if _, class := mmapRead(t, d, id, "/root/plain", 0, 64<<20+1); class != "invalid_argument" {
		t.Errorf("over the cap: %q", class)
	}
	if err := os.Truncate(dir+"/srv/rw/big", 100); err != nil { // while the guest remembers its length
		t.Fatal(err)
	}
	if got, class := mmapRead(t, d, id, "/mnt/rw/big", 0, size); class != "" || !bytes.HasPrefix(content, bytes.TrimRight(got, "\x00")) {
		t.Errorf("of a file that was cut: %d bytes, %s", len(got), class)
	}
}

// mmapRead returns what was read, or the class of the error.
func mmapRead(t *testing.T, d *harness.Daemon, id, path string, offset, length uint64) ([]byte, string) {
	t.Helper()
	body := fmt.Sprintf(`{"path":%q,"offset":"%d","length":"%d"}`, path, offset, length)
	res, err := http.Post("http://"+d.TCP+"/sandboxes/"+id+"/arcbox.v1.AgentService/MmapReadFile", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var reply struct {
		Data      []byte `json:"data"`
		BytesRead string `json:"bytesRead"`
		Code      string `json:"code"`
	}
	if err := json.NewDecoder(res.Body).Decode(&reply); err != nil {
		t.Fatalf("%s: %v", res.Status, err)
	}
	if read := reply.BytesRead; reply.Code == "" && read != fmt.Sprint(len(reply.Data)) && (read != "" || len(reply.Data) != 0) {
		t.Errorf("%d bytes are told as %q", len(reply.Data), read)
	}
	return reply.Data, reply.Code
}

func bootAgain(t *testing.T, d *harness.Daemon, id string, sh func(string) string, dir string) {
	sh("echo last > /mnt/rw/last")
	shutDown(t, d, id)
	harness.Eventually(t, 2*time.Minute, func() error {
		if r := inspect(t, d, id); r.Info.Status != "stopped" {
			return fmt.Errorf("it is %s", r.Info.Status)
		}
		return nil
	})
	if b, err := os.ReadFile(dir + "/srv/rw/last"); err != nil || string(b) != "last\n" {
		t.Errorf("the last word: %q, %v", b, err)
	}
	if left := traces(t, id); len(left) != 0 {
		t.Errorf("left while it is stopped: %q", left)
	}
	d.Hutch("resume", id)
	if got := sh("cat /mnt/rw/last"); got != "last" {
		t.Errorf("after a boot: %q", got)
	}
}

// loseShare ends the server of the first share: it is told, and the sandbox goes
// on with the other one.
func loseShare(t *testing.T, d *harness.Daemon, id string, sh func(string) string) {
	for _, trace := range traces(t, id) {
		var pid int
		if _, err := fmt.Sscanf(trace, "process %d of "+id+"_share0", &pid); err == nil {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	const told = "is lost until the sandbox boots again"
	harness.Eventually(t, time.Minute, func() error {
		if r := d.Try("events", "--no-follow"); !strings.Contains(r.Stdout, told) || strings.Count(r.Stdout, told) != 1 {
			return fmt.Errorf("events say\n%s%s", r.Stdout, r.Stderr)
		}
		return nil
	})
	if got := sh("cat /mnt/rw/file"); got != "from the host" {
		t.Errorf("the other share: %q", got)
	}
}

// traces are the processes and cgroups of a sandbox's machine and shares, sorted
// in no way. Its id is nobody else's.
func traces(t *testing.T, id string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it ended meanwhile
		}
		if _, after, ok := strings.Cut(string(b), "/"+id); ok {
			cell, _, _ := strings.Cut(id+after, "\n")
			found = append(found, fmt.Sprintf("process %s of %s", filepath.Base(filepath.Dir(f)), cell))
		}
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/hutch-*/" + id + "*")
	if err != nil {
		t.Fatal(err)
	}
	return append(found, groups...)
}
