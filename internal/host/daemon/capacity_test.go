package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestProcTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table")
	text := "MemTotal:  100 kB\nMemAvailable:    2048000 kB\nHugePages:\nFree: x kB\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := procTable(path)
	if diff := cmp.Diff(map[string]int64{"MemTotal": 100 << 10, "MemAvailable": 2048000 << 10}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestCapacityOfThisHost(t *testing.T) {
	if c, err := capacity(t.TempDir()); err != nil || c.MemoryMB <= 0 || c.DiskMB <= 0 {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := capacity(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a root that is not there has room")
	}
}
