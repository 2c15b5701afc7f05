package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// callers is how many use a sandbox that sleeps at the same time.
const callers = 8

// TestTimeoutAndUse has a sandbox fall asleep by its timeout, and woken by the
// first of many who use it, again and again, with a hutchd killed in between.
func TestTimeoutAndUse(t *testing.T) {
	for then, asleep := range map[string]string{"hibernate": "hibernated", "pause": "paused"} {
		t.Run(then, func(t *testing.T) {
			d := harness.Start(t, harness.Options{TCP: true})
			box := d.Create("-m", "128", "--id", "light", "--idle", "4s", "--on-timeout", then, "--auto-resume")
			d.Hutch("exec", box, "--", "sh", "-c", `mkdir -p /srv && echo "from the guest" > /srv/page && httpd -p 8001 -h /srv
				(i=0; while :; do i=$((i+1)); echo $i > /tmp/count.new; mv /tmp/count.new /tmp/count; sleep 0.1; done) > /dev/null 2>&1 &
				echo $! > /tmp/pid`)
			pid := d.Hutch("exec", box, "--", "cat", "/tmp/pid")
			for round := range 3 {
				d.Hutch("wait", "--for", asleep, box)
				wantStatus(t, d, box, asleep, "inactive for 4s")
				if round == 1 {
					d.Down(syscall.SIGKILL)
					d.Up()
				}
				looksWakeNothing(t, d, box, asleep)
				mark := len(strings.Split(d.Hutch("events", "--no-follow"), "\n"))
				useAtOnce(t, d, box)
				told := strings.Split(d.Hutch("events", "--no-follow"), "\n")[mark:]
				if n := strings.Count(strings.Join(told, "\n"), asleep+" -> "); n != 1 {
					t.Errorf("round %d: woken %d times:\n%s", round, n, strings.Join(told, "\n"))
				}
				stillCounts(t, d, box, pid)
			}
			if r := inspect(t, d, box); r.Boots != map[string]int{"hibernate": 4, "pause": 1}[then] || !r.Auto || r.Then != "ON_TIMEOUT_"+strings.ToUpper(then) {
				t.Errorf("it is %+v", r)
			}
		})
	}
}

func looksWakeNothing(t *testing.T, d *harness.Daemon, box, asleep string) {
	t.Helper()
	for _, look := range [][]string{{"ls"}, {"inspect", box}, {"stats", box}, {"logs", box}} {
		d.Hutch(look...)
	}
	if got := inspect(t, d, box).Info.Status; got != asleep {
		t.Errorf("after looks it is %s", got)
	}
}

// useAtOnce uses a sandbox by exec, files and a port, all at the same time.
func useAtOnce(t *testing.T, d *harness.Daemon, box string) {
	t.Helper()
	base := "http://" + d.TCP + "/sandboxes/" + box
	var wg sync.WaitGroup
	for n := range callers {
		wg.Go(func() {
			switch n % 3 {
			case 0:
				if r := d.Try("exec", box, "--", "echo", "hi"); r.Stdout != "hi\n" {
					t.Errorf("exec: %+v", r)
				}
			case 1:
				read(t, base+"/files?path=/srv/page")
			case 2:
				read(t, base+"/ports/8001/page")
			}
		})
	}
	wg.Wait()
}

// read gets the guest's page.
func read(t *testing.T, url string) {
	req, err := http.NewRequestWithContext(testenv.Context(t), http.MethodGet, url, nil)
	if err != nil {
		t.Error(err)
		return
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(res.Body); err != nil || res.StatusCode != 200 || string(b) != "from the guest\n" {
		t.Errorf("%s: %d %q, %v", url, res.StatusCode, b, err)
	}
}

// stillCounts looks for the program that counts: the same one, going on.
func stillCounts(t *testing.T, d *harness.Daemon, box, pid string) {
	t.Helper()
	before := d.Hutch("exec", box, "--", "sh", "-c", "kill -0 "+pid+" && cat /tmp/count")
	harness.Eventually(t, 20*time.Second, func() error {
		if now := d.Hutch("exec", box, "--", "cat", "/tmp/count"); now == before {
			return fmt.Errorf("the program in the background stands at %s", now)
		}
		return nil
	})
}
