package testenv

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// requireVariable names what must not be skipped, as a comma list.
const requireVariable = "REQUIRE"

// RequireRoot skips the test, or fails it when REQUIRE names "root", unless it
// runs as root on Linux.
func RequireRoot(t testing.TB) {
	t.Helper()
	require(t, "root", missingRoot())
}

// RequireVM skips the test, or fails it when REQUIRE names "vm", unless it can
// start virtual machines: root on Linux, with qemu-system-x86_64 in PATH.
func RequireVM(t testing.TB) {
	t.Helper()
	require(t, "vm", missingVM())
}

// require ends the test when something is missing.
func require(t testing.TB, need, missing string) {
	t.Helper()
	if missing == "" {
		return
	}
	if slices.Contains(required(os.Getenv(requireVariable)), need) {
		t.Fatalf("%s needs %s, and %s=%s forbids to skip: %s",
			t.Name(), need, requireVariable, os.Getenv(requireVariable), missing)
	}
	t.Skipf("needs %s: %s", need, missing)
}

func required(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

func missingRoot() string {
	if runtime.GOOS != "linux" {
		return "not Linux but " + runtime.GOOS
	}
	if id := os.Geteuid(); id != 0 {
		return fmt.Sprintf("the effective user is %d", id)
	}
	return ""
}

func missingVM() string {
	if missing := missingRoot(); missing != "" {
		return missing
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return err.Error()
	}
	return ""
}

// longest is what nothing that a test waits for takes, on a slow machine either.
const longest = 6 * time.Minute

// Context returns a context that ends when the test does, after longest, or a
// little before the deadline of the test run: a test that hangs can still tell
// where and clean up, and those after it have their turn.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), longest)
	t.Cleanup(cancel)
	d, ok := t.(interface{ Deadline() (time.Time, bool) })
	if !ok {
		return ctx
	}
	deadline, ok := d.Deadline()
	if !ok {
		return ctx
	}
	ctx, cancel = context.WithDeadline(ctx, deadline.Add(-margin(time.Until(deadline))))
	t.Cleanup(cancel)
	return ctx
}

// margin is the part of the time left that is kept for cleaning up: a tenth,
// at most ten seconds.
func margin(left time.Duration) time.Duration {
	return min(left/10, 10*time.Second)
}

// Soak reports whether tests are to take sizes and repetitions for which there
// is no time in every run: HUTCH_SOAK=1.
func Soak() bool { return os.Getenv("HUTCH_SOAK") != "" }
