package boot

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestStepsAreNamedOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range slices.Concat(stageOne(), stageTwo(), stageThree()) {
		if s.name == "" || s.run == nil || seen[s.name] {
			t.Errorf("step %q is nameless, empty or there twice", s.name)
		}
		seen[s.name] = true
	}
}

func TestAFailingStepStopsTheBootUnlessOptional(t *testing.T) {
	var ran []string
	mark := func(name string, err error) func() error {
		return func() error { ran = append(ran, name); return err }
	}
	boom := errors.New("boom")
	var warned []string
	err := runSteps([]step{
		{"one", mark("one", nil), false},
		{"two", mark("two", boom), true},
		{"three", func() error { panic("oops") }, true},
		{"four", mark("four", boom), false},
		{"five", mark("five", nil), false},
	}, func(s string) { warned = append(warned, s) })
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "four") {
		t.Errorf("error %v, want boom from step four", err)
	}
	if got := strings.Join(ran, " "); got != "one two four" {
		t.Errorf("ran %s", got)
	}
	if len(warned) != 2 || !strings.Contains(warned[1], "oops") {
		t.Errorf("warnings %q", warned)
	}
}

func TestFindDiskGoesBySerial(t *testing.T) {
	sys := t.TempDir()
	for dev, serial := range map[string]string{"vda": "data", "vdb": "root\n", "vdc": "modules\x00\x00"} {
		dir := filepath.Join(sys, "block", dev)
		os.MkdirAll(dir, 0o755)
		os.WriteFile(filepath.Join(dir, "serial"), []byte(serial), 0o644)
	}
	for serial, want := range map[string]string{"root": "/dev/vdb", "data": "/dev/vda", "modules": "/dev/vdc", "roo": "", "none": ""} {
		if got, err := findDisk(sys, serial); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", serial, got, err, want)
		}
	}
}

func TestMakeMountPointNeverFollowsALink(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	link := filepath.Join(dir, "run")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	if err := makeMountPoint(link); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(link); err != nil || !fi.IsDir() {
		t.Errorf("mount point is %v, %v", fi, err)
	}
}

// exits is what a fake machine reports, one child after the other.
type exit struct {
	pid    int
	status syscall.WaitStatus
	err    error
}

// TestInitRestartsTheServerAndReapsOrphans drives PID 1's loop with a scripted
// machine until the script ends in a panic, which the guard turns into the end.
func TestInitRestartsTheServerAndReapsOrphans(t *testing.T) {
	script := []exit{
		{pid: 900}, {err: syscall.EINTR}, {pid: 901}, {pid: 100}, // orphans, then the server
		{pid: 902}, {pid: 101, status: 9}, // killed
		{err: syscall.ECHILD}, // lost
	}
	spawned, reaped := 0, 0
	settled := make(chan struct{}, 9)
	var pauses []time.Duration
	now := time.Unix(0, 0)
	i := &initProcess{
		spawn: func() (int, error) {
			spawned++
			if spawned == 4 {
				return 0, syscall.EAGAIN
			}
			if spawned > 4 {
				panic("script over")
			}
			return 99 + spawned, nil
		},
		wait: func() (int, syscall.WaitStatus, error) {
			e := script[0]
			script = script[1:]
			if e.pid != 0 {
				reaped++
			}
			return e.pid, e.status, e.err
		},
		sleep:  func(d time.Duration) { pauses = append(pauses, d); now = now.Add(d) },
		now:    func() time.Time { return now },
		settle: func() { settled <- struct{}{} },
	}
	if err := guard(i.run); err == nil || !strings.Contains(err.Error(), "script over") {
		t.Fatalf("loop ended with %v", err)
	}
	if spawned != 5 || reaped != 5 || len(script) != 0 {
		t.Errorf("spawned %d, reaped %d, %d left of the script", spawned, reaped, len(script))
	}
	<-settled // once, whatever the number of servers
	if len(settled) != 0 {
		t.Errorf("settled %d times more", len(settled))
	}
	for n := 1; n < len(pauses); n++ {
		if pauses[n] != 2*pauses[n-1] {
			t.Errorf("pauses %v do not double", pauses)
		}
	}
}

func TestBackOffStartsAnewAfterASteadyServer(t *testing.T) {
	now := time.Unix(0, 0)
	var pauses []time.Duration
	n := 0
	i := &initProcess{
		spawn: func() (int, error) {
			if n++; n > 12 {
				panic("over")
			}
			return n, nil
		},
		wait: func() (int, syscall.WaitStatus, error) {
			if n == 11 {
				now = now.Add(time.Hour)
			}
			return n, 0, nil
		},
		sleep:  func(d time.Duration) { pauses = append(pauses, d) },
		now:    func() time.Time { return now },
		settle: func() {},
	}
	if err := guard(i.run); err == nil {
		t.Fatal("loop ended without the script")
	}
	if pauses[9] != maxPause || pauses[10] != firstPause {
		t.Errorf("pauses %v: want the cap, then the first again", pauses)
	}
}
