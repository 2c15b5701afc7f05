package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// digest is how the guest's sha256sum prints it.
func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// random returns n bytes that look like nothing.
func random(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(b)
	return b
}

// TestPrograms runs programs of every kind in one sandbox.
func TestPrograms(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := d.Create("-m", "128", "-e", "FROM_CREATE=yes")

	t.Run("exit codes are docker's", func(t *testing.T) {
		for line, want := range map[string]int{
			"true": 0, "sh -c 'exit 7'": 7, "sh -c 'kill -9 $$'": 137, "no-such-program": 127, "/etc": 126, "--timeout 1s @ sleep 60": 124,
		} {
			args := []string{"exec", id, "--"}
			if flags, rest, ok := strings.Cut(line, " @ "); ok {
				args, line = append(append([]string{"exec"}, strings.Fields(flags)...), id, "--"), rest
			}
			if program, script, ok := strings.Cut(line, " -c "); ok {
				args = append(args, program, "-c", strings.Trim(script, "'"))
			} else {
				args = append(args, strings.Fields(line)...)
			}
			if r := d.Try(args...); r.Code != want {
				t.Errorf("%s: exit %d, want %d (%s)", line, r.Code, want, r.Stderr)
			}
		}
		if r := d.Try("exec", "sb-nonexist", "--", "true"); r.Code != 125 {
			t.Errorf("unknown sandbox: exit %d, want 125", r.Code)
		}
	})
	t.Run("streams are apart and whole", func(t *testing.T) {
		r := d.Try("exec", id, "--", "sh", "-c", "seq 1 200000; echo end >&2")
		if lines := strings.Count(r.Stdout, "\n"); lines != 200000 || r.Stderr != "end\n" {
			t.Errorf("%d lines, stderr %q", lines, r.Stderr)
		}
	})
	t.Run("environment, directory and user", func(t *testing.T) {
		got := d.Hutch("exec", "-e", "HERE=there", "-w", "/usr", id, "--", "sh", "-c", "echo $FROM_CREATE $HERE $PWD $(id -un)")
		if got != "yes there /usr root" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("stdin through a pipe, both ways", func(t *testing.T) {
		in := random(20 << 20)
		c := d.Command(testenv.Context(t), "exec", "-i", id, "--", "cat")
		c.Stdin = bytes.NewReader(in)
		out, err := c.Output()
		if err != nil || digest(out) != digest(in) {
			t.Errorf("sent %d bytes, got %d (%v)", len(in), len(out), err)
		}
	})
	t.Run("tar into the sandbox", func(t *testing.T) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := range 50 {
			body := fmt.Sprintf("file %d\n", i)
			w.WriteHeader(&tar.Header{Name: fmt.Sprintf("d/f%d", i), Mode: 0o644, Size: int64(len(body))})
			io.WriteString(w, body)
		}
		w.Close()
		c := d.Command(testenv.Context(t), "exec", "-i", id, "--", "sh", "-c", "mkdir -p /srv && tar x -C /srv && cat /srv/d/* | wc -l")
		c.Stdin = &b
		if out, err := c.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "50" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("a background child does not hold the call", func(t *testing.T) {
		if r := d.Try("exec", id, "--", "sh", "-c", "sleep 300 & echo started"); r.Code != 0 || r.Stdout != "started\n" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("a time limit ends the whole tree", func(t *testing.T) {
		if r := d.Try("exec", "--timeout", "2s", id, "--", "sh", "-c", "echo early; setsid sleep 4242 & wait"); r.Code != 124 || r.Stdout != "early\n" {
			t.Errorf("%+v", r)
		}
		if got := d.Try("exec", id, "--", "sh", "-c", "ps -o args | grep -c '^sleep 4242'").Stdout; got != "0\n" {
			t.Errorf("still there: %s", got)
		}
	})
	t.Run("terminal", func(t *testing.T) { terminal(t, d, id) })
}

// terminal types into a full-screen editor and reads the file that it wrote.
func terminal(t *testing.T, d *harness.Daemon, id string) {
	c := d.Command(testenv.Context(t), "exec", "-it", id, "--", "sh", "-c", "stty size; vi /root/typed; stty size")
	screen, err := pty.StartWithSize(c, &pty.Winsize{Cols: 100, Rows: 33})
	if err != nil {
		t.Fatal(err)
	}
	defer screen.Close()
	var shown bytes.Buffer
	// show waits until the screen has shown want since the last call.
	show := func(want string) {
		t.Helper()
		buf := make([]byte, 4096)
		screen.SetReadDeadline(time.Now().Add(time.Minute))
		for !strings.Contains(shown.String(), want) {
			n, err := screen.Read(buf)
			shown.Write(buf[:n])
			if err != nil {
				t.Fatalf("screen never showed %q: %v\n%q", want, err, shown.String())
			}
		}
		shown.Reset()
	}
	show("33 100")
	show("- /root/typed") // the editor's status line: command mode
	io.WriteString(screen, "i")
	show("I /root/typed")
	io.WriteString(screen, "hello from a terminal")
	show("terminal")
	// An escape with something right behind it would be a function key.
	io.WriteString(screen, "\x1b")
	show("- /root/typed")
	if err := pty.Setsize(screen, &pty.Winsize{Cols: 90, Rows: 20}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(screen, ":wq\r")
	show("20 90")
	if err := c.Wait(); err != nil {
		t.Errorf("session ended with %v", err)
	}
	if got := d.Hutch("exec", id, "--", "cat", "/root/typed"); got != "hello from a terminal" {
		t.Errorf("the editor wrote %q", got)
	}
}

// TestCopies moves files and trees both ways; with -short the big file is
// small.
func TestCopies(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	id := d.Create("-m", "128")
	local := t.TempDir()

	t.Run("a tree there and back", func(t *testing.T) {
		from := filepath.Join(local, "tree")
		for i := range 20 {
			path := filepath.Join(from, fmt.Sprint("d", i%3), fmt.Sprint("f", i))
			os.MkdirAll(filepath.Dir(path), 0o755)
			if err := os.WriteFile(path, random(1000*i), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		os.Symlink("d0/f0", filepath.Join(from, "link"))
		d.Hutch("cp", from, id+":/srv/")
		d.Hutch("cp", id+":/srv/tree", filepath.Join(local, "back"))
		for i := range 20 {
			rel := filepath.Join(fmt.Sprint("d", i%3), fmt.Sprint("f", i))
			got, err := os.ReadFile(filepath.Join(local, "back", rel))
			if err != nil || !bytes.Equal(got, random(1000*i)) {
				t.Errorf("%s: %d bytes, %v", rel, len(got), err)
			}
		}
		if target, err := os.Readlink(filepath.Join(local, "back/link")); err != nil || target != "d0/f0" {
			t.Errorf("link: %q, %v", target, err)
		}
	})
	t.Run("modes there and back", func(t *testing.T) {
		for _, mode := range []os.FileMode{0o755, 0o600, 0o444} {
			path := filepath.Join(local, fmt.Sprintf("mode-%o", mode))
			if err := os.WriteFile(path, []byte("#!/bin/sh\necho ran\n"), mode); err != nil {
				t.Fatal(err)
			}
			d.Hutch("cp", path, id+":/srv/")
			if got := d.Hutch("exec", id, "--", "stat", "-c", "%a", "/srv/"+filepath.Base(path)); got != fmt.Sprintf("%o", mode) {
				t.Errorf("in the sandbox %s, want %o", got, mode)
			}
			d.Hutch("exec", id, "--", "ln", "-sf", filepath.Base(path), "/srv/link")
			d.Hutch("cp", id+":/srv/link", path+".back")
			if fi, err := os.Stat(path + ".back"); err != nil || fi.Mode() != mode {
				t.Errorf("back %v, %v, want %o", fi, err, mode)
			}
		}
		if got := d.Hutch("exec", id, "--", "/srv/mode-755"); got != "ran" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("a big file there and back", func(t *testing.T) {
		size := int64(256 << 20) // more than either side may keep
		if testenv.Soak() {
			size = 2 << 30
		}
		bigFile(t, d, id, filepath.Join(local, "big"), size)
	})
	t.Run("missing files", func(t *testing.T) {
		if r := d.Try("cp", id+":/no/such", local); r.Code != 125 || !strings.Contains(r.Stderr, "/no/such") {
			t.Errorf("%+v", r)
		}
		if r := d.Try("cp", "/no/such", id+":/"); r.Code != 125 || !strings.Contains(r.Stderr, "/no/such") {
			t.Errorf("%+v", r)
		}
	})
}

// bigFile copies a file of the given size there and back, compares digests,
// and looks at the memory that both daemons needed.
func bigFile(t *testing.T, d *harness.Daemon, id, path string, size int64) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	rng := rand.NewChaCha8([32]byte{7})
	if _, err := io.CopyN(io.MultiWriter(f, sum), rng, size); err != nil {
		t.Fatal(err)
	}
	want := hex.EncodeToString(sum.Sum(nil))
	d.Hutch("cp", path, id+":/big")
	if got := d.Hutch("exec", id, "--", "sha256sum", "/big"); !strings.HasPrefix(got, want) {
		t.Errorf("in the sandbox: %s, want %s", got, want)
	}
	d.Hutch("cp", id+":/big", path+".back")
	back, err := os.Open(path + ".back")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	sum.Reset()
	if n, err := io.Copy(sum, back); err != nil || n != size || hex.EncodeToString(sum.Sum(nil)) != want {
		t.Errorf("back: %d bytes, %v", n, err)
	}
	// VmHWM is the most that was ever resident.
	if kb := peakKiB(t, fmt.Sprintf("/proc/%d/status", d.PID()), os.ReadFile); kb > 150<<10 {
		t.Errorf("hutchd needed %d KiB", kb)
	}
	inside := func(path string) ([]byte, error) {
		return []byte(d.Hutch("exec", id, "--", "sh", "-c", "cat /proc/$(ps | awk '/[h]utch-agent serve/ {print $1}')/status")), nil
	}
	if kb := peakKiB(t, "", inside); kb > 48<<10 {
		t.Errorf("hutch-agent needed %d KiB", kb)
	}
}

func peakKiB(t *testing.T, path string, read func(string) ([]byte, error)) int {
	t.Helper()
	b, err := read(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kb int
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kb); err == nil {
			return kb
		}
	}
	t.Fatalf("no VmHWM in %s", b)
	return 0
}
