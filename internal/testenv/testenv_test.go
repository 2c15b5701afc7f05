package testenv

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// recorder stands for a test and keeps what was said about it.
type recorder struct {
	testing.TB
	cleanups []func()
	errors   []string
	skip     string
	fatal    string
}

func (r *recorder) Name() string     { return "TestRecorded" }
func (r *recorder) Helper()          {}
func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}
func (r *recorder) Fatalf(format string, args ...any) {
	r.fatal = fmt.Sprintf(format, args...)
	runtime.Goexit()
}
func (r *recorder) Skipf(format string, args ...any) {
	r.skip = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// run calls f as the testing package calls a test: it may end its goroutine.
func (r *recorder) run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

func (r *recorder) cleanup() {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
}

func TestRequire(t *testing.T) {
	for _, tc := range []struct {
		name, list, missing string
		skips, fails        bool
	}{
		{"nothing missing", "root,vm", "", false, false},
		{"missing, not required", "", "no such thing", true, false},
		{"missing, other required", "root", "no such thing", true, false},
		{"missing and required", "root,vm", "no such thing", false, true},
		{"blanks in the list", " root , vm ", "no such thing", false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv(requireVariable, tc.list)
			r := &recorder{}
			went := false
			r.run(func() {
				require(r, "vm", tc.missing)
				went = true
			})
			if got := r.skip != ""; got != tc.skips {
				t.Errorf("skipped = %v (%q), want %v", got, r.skip, tc.skips)
			}
			if got := r.fatal != ""; got != tc.fails {
				t.Errorf("failed = %v (%q), want %v", got, r.fatal, tc.fails)
			}
			if want := !tc.skips && !tc.fails; went != want {
				t.Errorf("test went on = %v, want %v", went, want)
			}
			if told := r.skip + r.fatal; tc.missing != "" && !strings.Contains(told, tc.missing) {
				t.Errorf("%q does not tell what is missing", told)
			}
		})
	}
}

func TestMissingVMWithoutQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if missingVM() == "" {
		t.Error("an empty PATH is said to have a VMM in it")
	}
}

func TestCheckGoroutinesReportsALeak(t *testing.T) {
	r := &recorder{}
	CheckGoroutines(r)
	started, stop := make(chan struct{}), make(chan struct{})
	go leakOnPurpose(started, stop)
	<-started
	before := map[string]bool{}
	left := leftover(before, 0)
	close(stop)
	if !strings.Contains(strings.Join(left, "\n"), "leakOnPurpose") {
		t.Errorf("the leaked goroutine is not among those left: %q", left)
	}
	r.cleanup()
	if len(r.errors) != 0 {
		t.Errorf("a goroutine that ended is reported: %s", r.errors)
	}
}

func leakOnPurpose(started chan<- struct{}, stop <-chan struct{}) {
	close(started)
	<-stop
}

func TestParseStacks(t *testing.T) {
	dump := strings.Join([]string{
		"goroutine 7 [running]:\nwho.asks()",
		"goroutine 1 [chan receive]:\ntesting.(*T).Run(0x1)\ncreated by nobody",
		"goroutine 8 [select]:\nmine.loop()\ncreated by mine.start in goroutine 7",
		"goroutine 9 [syscall]:\nos/signal.signal_recv()\ncreated by os/signal.Notify.func1.1",
		"no goroutine at all",
	}, "\n\n")
	want := []string{"8"}
	var got []string
	for _, g := range parseStacks([]byte(dump)) {
		got = append(got, g.id)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("goroutines (-want +got):\n%s", diff)
	}
}

func TestContextKeepsTimeForCleanup(t *testing.T) {
	ctx := Context(t)
	if err := ctx.Err(); err != nil {
		t.Fatalf("the context is dead at the start: %v", err)
	}
	deadline, ok := ctx.Deadline()
	whole, limited := t.Deadline()
	if ok != limited {
		t.Fatalf("context has a deadline = %v, test has one = %v", ok, limited)
	}
	if ok && !deadline.Before(whole) {
		t.Errorf("the context ends %v after the test's deadline", deadline.Sub(whole))
	}
	for left, want := range map[time.Duration]time.Duration{
		20 * time.Second: 2 * time.Second,
		10 * time.Minute: 10 * time.Second,
	} {
		if got := margin(left); got != want {
			t.Errorf("margin(%v) = %v, want %v", left, got, want)
		}
	}
}

func TestMain(m *testing.M) {
	// A copy of this program stands for a process that a test leaves behind.
	if len(os.Args) == 3 && os.Args[1] == "wait-on-stdin" {
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	os.Exit(m.Run())
}
