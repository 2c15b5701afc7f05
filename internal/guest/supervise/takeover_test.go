package supervise

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// chatty writes a line whenever it gets a signal, and does not outlive a broken
// pipe.
const chatty = `set -e; trap 'echo heard' USR1; trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done`

// tell sends the program of chatty a signal, and reads its answer.
func hear(t *testing.T, s *Supervisor, st Status, times int) {
	t.Helper()
	if err := unix.Kill(st.PID, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	awaitLog(t, s, "a", says("heard\n", times))
}

// TestTheNextServerTakesOver ends the supervision and begins another, as a
// crash of the server does.
func TestTheNextServerTakesOver(t *testing.T) {
	p := newPlace(t)
	first := p.start()
	define(t, first, shell("a", chatty))
	st := begin(t, first, "a")
	awaitLog(t, first, "a", says("up\n", 1))
	hear(t, first, st, 1)
	first.Close()
	if !alive(st.PID) {
		t.Fatal("the program went with its supervisor")
	}
	if err := unix.Kill(st.PID, unix.SIGUSR1); err != nil { // writes while nobody reads
		t.Fatal(err)
	}

	next := p.start()
	if !next.Left("a") || next.Left("b") {
		t.Errorf("left: a %v, b %v", next.Left("a"), next.Left("b"))
	}
	define(t, next, shell("a", chatty))
	again := ready(t, next, "a")
	awaitLog(t, next, "a", says("heard\n", 1)) // two signals at once may be one
	if again.PID != st.PID || again.Crashes != 0 {
		t.Errorf("before %+v, after %+v", st, again)
	}
	hear(t, next, again, 2)
	kill(t, again)
	crashed := await(t, next, "a", func(st Status) bool { return st.Crashes == 1 && st.State == Ready })
	if crashed.PID == st.PID || crashed.Last.Known && crashed.Last.Signal != unix.SIGKILL {
		t.Errorf("after a crash: %+v %+v", crashed, crashed.Last)
	}
	stop(t, next, "a", 0)
}

// TestWhatEndedUnseenIsStartedAgain kills the program while no supervisor is
// there.
func TestWhatEndedUnseenIsStartedAgain(t *testing.T) {
	p := newPlace(t)
	first := p.start()
	define(t, first, shell("a", stays))
	st := begin(t, first, "a")
	first.Close()
	kill(t, st)
	reap(st.PID) // as PID 1 would

	next := p.start()
	define(t, next, shell("a", stays))
	again := ready(t, next, "a")
	if again.PID == st.PID || again.Crashes != 1 || again.Last == nil || again.Last.String() != "ended unseen" {
		t.Errorf("afterwards %+v", again)
	}
	next.Close()
	third := p.start()
	define(t, third, shell("a", stays))
	if last := ready(t, third, "a"); last.PID != again.PID || last.Crashes != 1 {
		t.Errorf("the third finds %+v", last)
	}
	stop(t, third, "a", 0)
	if third.Left("a") {
		t.Error("a stopped unit is still noted")
	}
}

// TestAnotherProcessIsNotTakenOver has a note that names a pid of somebody else.
func TestAnotherProcessIsNotTakenOver(t *testing.T) {
	p := newPlace(t)
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	started, err := startOf(os.Getpid())
	if err != nil || started == 0 {
		t.Fatalf("this process started at %d, %v", started, err)
	}
	s := p.start()
	if err := (note{pid: os.Getpid(), started: started + 1, ready: true}).write(s.notePath("a")); err != nil {
		t.Fatal(err)
	}
	define(t, s, shell("a", stays))
	if st := ready(t, s, "a"); st.PID == os.Getpid() || st.Crashes != 1 {
		t.Errorf("%+v", st)
	}
	stop(t, s, "a", 0)
	if err := os.WriteFile(s.notePath("b"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	define(t, s, shell("b", stays))
	if st, _ := s.Status("b"); st.State != Stopped {
		t.Errorf("garbage is believed: %+v", st)
	}
}

func TestNote(t *testing.T) {
	n := note{pid: 12, started: 1 << 60, ready: true, crashes: 3}
	if got, err := parseNote(n.encode()); err != nil || got != n {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "hutch-unit-2 1 1 1 1\n", "hutch-unit-1 1 1\n", "hutch-unit-1 -1 1 1 1\n"} {
		if got, err := parseNote(bad); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
	if _, err := startOf(1 << 22); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("start of nobody: %v", err)
	}
}
