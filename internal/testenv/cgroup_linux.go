package testenv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup returns a fresh cgroup2 directory that is removed after the test. An
// empty tree without controllers will do. It needs root.
func Cgroup(t testing.TB) string {
	t.Helper()
	RequireRoot(t)
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(mount, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir := filepath.Join(mount, fmt.Sprintf("hutch-test-%d-%d", os.Getpid(), time.Now().UnixNano()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatalf("make cgroup: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				t.Errorf("cgroup of the test not empty: %v", err)
			}
		})
		return dir
	}
	t.Fatal("no cgroup2 filesystem is mounted: this test needs one (any empty tree will do)")
	return ""
}
