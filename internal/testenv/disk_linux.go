package testenv

import (
	"testing"

	"golang.org/x/sys/unix"
)

// SmallDisk returns an empty file system with little room, "64k" for one, that
// goes with the test. It needs root.
func SmallDisk(t testing.TB, size string) (dir string) {
	t.Helper()
	RequireRoot(t)
	dir = t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount a small disk: %v", err)
		}
	})
	return dir
}
