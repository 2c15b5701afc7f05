package testenv

import (
	"bytes"
	"fmt"
	"regexp"
	"runtime"
	"sort"
	"strings"
	"testing"
	"time"
)

// goroutineGrace is how long goroutines may take to end after a test.
const goroutineGrace = 5 * time.Second

// goroutine is one entry of a stack dump.
type goroutine struct {
	id    string
	stack string
}

// CheckGoroutines fails the test when goroutines that it started are still
// there 5 seconds after its end. Call it first, so that its check runs after
// the test's own cleanups. It sees the whole process: a test that uses it must
// not run in parallel with others.
func CheckGoroutines(t testing.TB) {
	t.Helper()
	before := map[string]bool{}
	for _, g := range goroutines() {
		before[g.id] = true
	}
	t.Cleanup(func() {
		t.Helper()
		left := leftover(before, goroutineGrace)
		if len(left) == 0 {
			return
		}
		t.Errorf("%d goroutines outlive %s:\n\n%s", len(left), t.Name(), strings.Join(left, "\n\n"))
	})
}

// leftover returns the stacks of goroutines that are not in before, as soon as
// there are none and at the latest after grace.
func leftover(before map[string]bool, grace time.Duration) []string {
	deadline := time.Now().Add(grace)
	tick := time.NewTicker(10 * time.Millisecond) // a goroutine's end is no event that others can wait for
	defer tick.Stop()
	for {
		var left []string
		for _, g := range goroutines() {
			if !before[g.id] {
				left = append(left, g.stack)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			sort.Strings(left)
			return left
		}
		<-tick.C
	}
}

// goroutines returns all goroutines but the current one and those that belong
// to the runtime and to the testing package.
func goroutines() []goroutine {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	return parseStacks(buf)
}

// parseStacks reads the output of runtime.Stack for all goroutines.
func parseStacks(dump []byte) []goroutine {
	header := regexp.MustCompile(`^goroutine (\d+) `)
	var all []goroutine
	for i, block := range bytes.Split(dump, []byte("\n\n")) {
		stack := strings.TrimSpace(string(block))
		m := header.FindStringSubmatch(stack)
		if i == 0 || m == nil || isOwn(stack) {
			continue // the first one is who asks
		}
		all = append(all, goroutine{id: m[1], stack: stack})
	}
	return all
}

// isOwn reports whether the stack belongs to the testing package or to the
// part of the runtime that starts goroutines once and keeps them.
func isOwn(stack string) bool {
	for _, mark := range []string{
		"testing.(*M).", "testing.tRunner(", "testing.(*T).Run(", "testing.runTests(",
		"testing.runFuzzing(", "testing.runFuzzTests(", "testing.(*F).Fuzz",
		"created by testing.", "created by os/signal.Notify", "os/signal.signal_recv(",
		"created by runtime.", "runtime.ReadTrace(", "runtime/pprof.profileWriter(",
	} {
		if strings.Contains(stack, mark) {
			return true
		}
	}
	return false
}

// String is for test failures of this package.
func (g goroutine) String() string { return fmt.Sprintf("%s: %s", g.id, g.stack) }
