package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// TestKilledWhileCopying kills hutchd at some moment of a copy, a sleep or a
// waking, and looks whether the next one finds the sandbox as it was before or
// as it was to be, with all that it had in memory. That every named step is hit
// is the matrix of package lifecycle; here are real machines.
func TestKilledWhileCopying(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	d.Hutch("template", "warm", "minimal", "-m", "128")
	box := d.Create("-m", "128", "--id", "box")
	d.Hutch("exec", box, "--", "sh", "-c", "dd if=/dev/urandom of=/dev/shm/p bs=1M count=20 2>/dev/null; sha256sum /dev/shm/p > /dev/shm/sum; echo kept > /root/file")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for round := range 3 {
		for _, args := range [][]string{
			{"hibernate", box}, {"resume", box}, {"snapshot", "create", box, fmt.Sprintf("s%d", round)}, {"fork", "-n", "2", box}, {"create", "-m", "128"},
		} {
			after := time.Duration(r.IntN(700)) * time.Millisecond
			killDuring(t, d, after, args)
			what := fmt.Sprintf("%q, killed after %v", args, after)
			checkAll(t, d, what)
			for _, id := range strings.Fields(d.Hutch("ls", "-q")) {
				if id != box {
					d.Hutch("rm", id)
				}
			}
			if args[0] == "hibernate" { // so that there is something to wake
				d.Hutch("hibernate", box)
			}
		}
	}
}

// killDuring runs a command and kills hutchd meanwhile, or at its end. A new one
// is there when it returns.
func killDuring(t *testing.T, d *harness.Daemon, after time.Duration, args []string) {
	t.Helper()
	c := d.Command(testenv.Context(t), args...)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Wait() }() // it may fail: its hutchd dies
	select {
	case <-done:
	case <-time.After(after):
	}
	d.Down(syscall.SIGKILL)
	<-done
	d.Up()
}

// checkAll wants of every sandbox that it is awake or can be woken, and answers;
// of those with the pattern in memory that it is right; and of every snapshot
// that it is whole.
func checkAll(t *testing.T, d *harness.Daemon, what string) {
	t.Helper()
	for _, id := range strings.Fields(d.Hutch("ls", "-q")) {
		r := inspect(t, d, id)
		if r.Info.Status != "running" && r.Info.Status != "hibernated" {
			t.Errorf("%s: %s is %s (%s)", what, id, r.Info.Status, r.Info.Reason)
		}
		d.Hutch("resume", id)
		check := "true"
		if id == "box" || r.Parent == "box" {
			check = "cd /dev/shm && sha256sum -c sum && grep -q kept /root/file"
		}
		d.Hutch("exec", id, "--", "sh", "-c", check)
	}
	for _, id := range strings.Fields(d.Hutch("snapshot", "ls", "-q")) {
		d.Hutch("snapshot", "verify", id)
	}
}

// TestAResumeEndsAHibernation resumes a sandbox while its memory is written.
func TestAResumeEndsAHibernation(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	box := d.Create("-m", "256", "--id", "box")
	d.Hutch("exec", box, "--", "sh", "-c", "dd if=/dev/urandom of=/dev/shm/p bs=1M count=60 2>/dev/null; sha256sum /dev/shm/p > /dev/shm/sum")
	interrupted := 0
	for round := range 4 {
		slept := make(chan error, 1)
		go func() {
			c := d.Command(testenv.Context(t), "hibernate", box)
			slept <- c.Run()
		}()
		select {
		case err := <-slept:
			slept <- err
		case <-time.After(time.Duration(100+150*round) * time.Millisecond):
		}
		d.Hutch("resume", box)
		var failed *exec.ExitError
		if err := <-slept; errors.As(err, &failed) {
			interrupted++
		}
		wantStatus(t, d, box, "running", "")
		d.Hutch("exec", box, "--", "sh", "-c", "cd /dev/shm && sha256sum -c sum")
	}
	if interrupted == 0 {
		t.Error("no hibernation was interrupted")
	}
}
