package metrics

import (
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

func newTest(l Levels) *Metrics {
	return New(Params{Version: "1.2.3", Snapshot: func() Levels { return l }})
}

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, body)
	}
	return string(body)
}

// TestNames holds the names, types and help texts of our own metrics: they are
// an interface that dashboards stand on. UPDATE=1 writes the file anew.
func TestNames(t *testing.T) {
	m := newTest(Levels{})
	m.CreateEnded(nil, time.Second, nil)
	var got strings.Builder
	for line := range strings.Lines(scrape(t, m)) {
		if strings.HasPrefix(line, "# HELP hutch_") || strings.HasPrefix(line, "# TYPE hutch_") {
			got.WriteString(line)
		}
	}
	golden := filepath.Join("testdata", "names.golden")
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("metrics changed (-golden +now); if on purpose, UPDATE=1 go test and change the table in doc.go:\n%s", diff)
	}
}

// TestTable holds the table of the package doc to what is served.
func TestTable(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	golden, err := os.ReadFile(filepath.Join("testdata", "names.golden"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(golden)) {
		if name := strings.Fields(line)[2]; !strings.Contains(string(doc), name) {
			t.Errorf("%s is not in the table of doc.go", name)
		}
	}
}

func TestValues(t *testing.T) {
	m := newTest(Levels{
		Sandboxes: map[sandbox.State]int{sandbox.Running: 3},
		SlotsUsed: 4, SlotsTotal: 1000,
	})
	m.CreateEnded(nil, 2*time.Second, []sandbox.Stage{{Name: "launch", Took: time.Second}})
	m.CreateEnded(fault.New(fault.Exhausted, "no room"), time.Second, nil)
	m.ExecEnded(nil, 20*time.Millisecond)
	m.ExecEnded(fault.New(fault.NotFound, "no such sandbox"), 0)
	m.EventHappened(sandbox.ByCrash)
	m.EventHappened("made up by somebody")
	m.ProxyStarted()
	m.ProxyStarted()
	m.ProxyEnded()

	got := scrape(t, m)
	for _, want := range []string{
		`hutch_build_info{version="1.2.3"} 1`,
		`hutch_sandboxes{state="running"} 3`,
		`hutch_sandboxes{state="broken"} 0`,
		`hutch_slots_used 4`,
		`hutch_slots_total 1000`,
		`hutch_create_total{result="ok"} 1`,
		`hutch_create_total{result="exhausted"} 1`,
		`hutch_create_seconds_count{stage="total"} 1`,
		`hutch_create_seconds_sum{stage="launch"} 1`,
		`hutch_exec_total{result="ok"} 1`,
		`hutch_exec_total{result="not_found"} 1`,
		`hutch_exec_total{result="internal"} 0`,
		`hutch_exec_seconds_count 1`,
		`hutch_events_total{cause="crash"} 1`,
		`hutch_proxy_connections 1`,
	} {
		if !strings.Contains(got, "\n"+want+"\n") {
			t.Errorf("missing: %s", want)
		}
	}
	if strings.Contains(got, "made up") {
		t.Error("a cause from outside became a label")
	}
	for _, runtime := range []string{"go_goroutines ", "process_open_fds "} {
		if !strings.Contains(got, "\n"+runtime) {
			t.Errorf("missing collector: %s", runtime)
		}
	}
}

func TestStagesAreBounded(t *testing.T) {
	m := newTest(Levels{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := range 100 {
				m.CreateEnded(nil, time.Second, []sandbox.Stage{{Name: fmt.Sprintf("s%d-%d", i, n)}})
			}
		})
	}
	wg.Wait()
	got := strings.Count(scrape(t, m), "\nhutch_create_seconds_count{")
	if want := maxStages + 1; got != want {
		t.Errorf("%d stages after 400 names, want %d", got, want)
	}
}
