package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// How often what is in memory sleeps, and is copied.
const (
	sleeps     = 12 // 50 in a soak
	forks      = 10
	checkEvery = 4 // sleeps, for a full check takes seconds under emulation
)

func howOften() int {
	if testenv.Soak() {
		return 50
	}
	return sleeps
}

// holder is a sandbox with a program that keeps 300 MB full of a pattern, and a
// loopback connection open.
type holder struct {
	*harness.Daemon
	t     *testing.T
	id    string
	turns int
}

func newHolder(t *testing.T, d *harness.Daemon) *holder {
	t.Helper()
	h := &holder{Daemon: d, t: t, id: d.Create("-m", "480", "--id", "holder")}
	putInside(t, d, h.id, buildInside(t))
	d.Hutch("exec", h.id, "--", "sh", "-c", "/bin/inside hold 300 4711 >/root/hold.log 2>&1 </dev/null &")
	harness.Eventually(t, time.Minute, func() error { // until it has filled its memory
		if r := d.Try("exec", h.id, "--", "/bin/inside", "tell", "turn"); r.Code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	h.turns++
	return h
}

// turn changes a tenth of the memory, and a file on disk.
func (h *holder) turn() {
	h.t.Helper()
	h.turns++
	said := h.Hutch("exec", h.id, "--", "sh", "-c", "echo $0 >> /root/turns; /bin/inside tell turn", fmt.Sprint(h.turns))
	if want := fmt.Sprintf("turned %d", h.turns); strings.TrimSpace(said) != want {
		h.t.Fatalf("%s: %q, want %q", h.id, said, want)
	}
}

// check has every byte of the memory compared, and looks at the file.
func (h *holder) check() {
	h.t.Helper()
	said := h.Hutch("exec", h.id, "--", "sh", "-c", "tail -n 1 /root/turns; /bin/inside tell check")
	if want := fmt.Sprintf("%d\nright after %d turns", h.turns, h.turns); strings.TrimSpace(said) != want {
		h.t.Fatalf("%s: %q, want %q", h.id, said, want)
	}
}

// TestPatternSurvives sleeps and forks again and again, and compares every byte.
func TestPatternSurvives(t *testing.T) {
	d := harness.Start(t, harness.Options{})
	h := newHolder(t, d)
	for i := range howOften() {
		h.turn()
		d.Hutch("hibernate", h.id)
		d.Hutch("resume", h.id)
		if (i+1)%checkEvery == 0 {
			h.check()
		}
	}
	for range forks {
		h.turn()
		before := *h
		h.id = strings.TrimSpace(d.Hutch("fork", h.id))
		h.check()
		before.turn() // goes on, and its copy knows nothing of it
		h.turn()
		h.check()
		d.Hutch("rm", before.id)
	}
	d.Hutch("exec", h.id, "--", "poweroff")
	wantStatus(t, d, h.id, "stopped", "")
	if faults := diskFaults(t, d, h.id); faults != "" {
		t.Errorf("its disk: %s", faults)
	}
}
