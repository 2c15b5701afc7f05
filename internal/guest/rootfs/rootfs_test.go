package rootfs

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenStaysInTheRoot(t *testing.T) {
	root := t.TempDir()
	for path, err := range map[string]error{
		"file":  os.WriteFile(filepath.Join(root, "file"), []byte("inside"), 0o600),
		"abs":   os.Symlink("/file", filepath.Join(root, "abs")),
		"up":    os.Symlink("../../../../../../file", filepath.Join(root, "up")),
		"self":  os.Symlink("self", filepath.Join(root, "self")),
		"out":   os.Symlink("/proc/self/cwd", filepath.Join(root, "out")),
		"fifo":  unix.Mkfifo(filepath.Join(root, "fifo"), 0o600),
		"magic": os.Symlink("/fd/0", filepath.Join(root, "magic")),
	} {
		if err != nil {
			t.Fatal(path, err)
		}
	}
	for path, want := range map[string]error{
		"/file": nil, "abs": nil, "/up": nil, "../file": nil, "/fifo": nil,
		"/self": unix.ELOOP, "/out": unix.ENOENT, "/none": unix.ENOENT, "/file/x": unix.ENOTDIR, "/magic": unix.ENOENT,
	} {
		f, err := Open(root, path)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
		if err != nil {
			continue
		}
		if text, err := io.ReadAll(f); path != "/fifo" && string(text) != "inside" {
			t.Errorf("%s: %q, %v", path, text, err)
		}
		f.Close()
	}
	if _, err := Open(filepath.Join(root, "none"), "file"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no root: %v", err)
	}
	if _, err := Open("/proc/self", "fd/0"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a magic link: %v", err)
	}
}
