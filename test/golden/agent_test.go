package golden

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/test/harness"
)

// maxAgentBytes is the promise of SPECIFICATION.md.
const maxAgentBytes = 15_000_000

func checkGolden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: make golden writes it", err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s differs; if that is meant, make golden:\n%s", path, d)
	}
}

func TestAgentLinksOnlyWhatIsKnown(t *testing.T) {
	c := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./cmd/hutch-agent")
	c.Dir = harness.Repo(t)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	checkGolden(t, "agent-deps.txt", string(out))
}

// TestAgentSize compares in steps of 256 KiB, so that a compiler's byte is no
// change.
func TestAgentSize(t *testing.T) {
	fi, err := os.Stat(harness.Bin(t, "hutch-agent"))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > maxAgentBytes {
		t.Errorf("hutch-agent has %d bytes, promised are at most %d", fi.Size(), maxAgentBytes)
	}
	const step = 256 << 10
	checkGolden(t, "agent-size.txt", fmt.Sprintf("at most %d KiB\n", (fi.Size()+step-1)/step*step>>10))
}

func TestAgentIsStatic(t *testing.T) {
	out, err := exec.Command("go", "version", "-m", harness.Bin(t, "hutch-agent")).Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "CGO_ENABLED=0") {
		t.Errorf("hutch-agent was built with cgo:\n%s", out)
	}
}
