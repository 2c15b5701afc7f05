package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/supervise"
	"github.com/hutch-run/hutch/internal/testenv"
)

// bench is a guest with a made-up distribution.
type bench struct {
	*Cluster
	t       *testing.T
	units   *supervise.Supervisor
	machine *fakeMachine
	root    string // holds the distribution's file
	data    string // as the distribution knows it
	wishes  string
}

// fakeMachine has what a test says that is left.
type fakeMachine struct {
	mu       sync.Mutex
	left     []string
	sticky   string // one that nothing removes
	resets   int
	removed  int
	restored int
}

func (m *fakeMachine) Prepare(_ context.Context, d Distribution) ([]string, error) {
	return []string{"no module of that name"}, os.MkdirAll(d.Data[0], 0o700)
}

func (m *fakeMachine) Leftovers(Leftovers) ([]Leftover, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Leftover
	for _, what := range m.left {
		all = append(all, Leftover{what, func(context.Context) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.removed++
			m.left = nil
			if m.sticky != "" {
				m.left = []string{m.sticky}
				return errors.New("it is busy")
			}
			return nil
		}})
	}
	return all, nil
}

func (m *fakeMachine) Reset(context.Context, Reset, []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.resets++
	return nil
}

func (m *fakeMachine) Restore() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.restored++
	return nil
}

func (m *fakeMachine) counts() (resets, removed, restored int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resets, m.removed, m.restored
}

func newBench(t *testing.T) *bench {
	t.Helper()
	cgroup := testenv.Cgroup(t)
	testenv.CheckGoroutines(t)
	dir := t.TempDir()
	b := &bench{t: t, machine: &fakeMachine{}, root: filepath.Join(dir, "root"), wishes: filepath.Join(dir, "wishes")}
	b.data = filepath.Join(dir, "data", "cluster")
	if err := os.MkdirAll(b.wishes, 0o755); err != nil {
		t.Fatal(err)
	}
	b.install(b.distribution(freePort(t)))
	services := filepath.Join(cgroup, "services")
	b.units = supervise.New(supervise.Params{Cgroups: services, Dir: filepath.Join(dir, "run"), Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() {
		_ = b.units.Stop(context.Background(), UnitName, -1)
		b.Close()
		b.units.Close()
		_ = killCgroup(context.Background(), services)
	})
	b.Cluster = New(Params{
		Root: b.root, Units: b.units, Machine: b.machine, Mark: filepath.Join(dir, "run", "mark"),
		Log: slog.New(slog.DiscardHandler), Needs: func(string) error { return nil },
	})
	return b
}

// freePort returns an address of the loopback that was free for TCP and UDP.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (b *bench) distribution(address string) Distribution {
	return Distribution{
		Version: 1, Name: "fake", Command: []string{os.Args[0]},
		Env:  []string{fakeEnv + "=" + b.data, "FAKE_ADDRESS=" + address, "FAKE_WISHES=" + b.wishes},
		Data: []string{b.data}, Kubeconfig: filepath.Join(b.data, "admin.kubeconfig"), Context: "fake",
		API: Access{
			URL: "https://" + address, CA: filepath.Join(b.data, "ca.crt"),
			Cert: filepath.Join(b.data, "admin.crt"), Key: filepath.Join(b.data, "admin.key"),
		},
		Components: []Component{{Name: "apiserver", URL: "https://" + address + "/livez"}, {Name: "kubelet", URL: "https://" + address + "/healthz/kubelet"}},
		Ready: Ready{
			Node: "node", Deployments: []string{"kube-system/coredns"},
			DNS: &Question{Server: address, Name: "kubernetes.default.svc.cluster.local"},
		},
		Stop: Stop{Timeout: 10}, Reset: Reset{Command: []string{"/bin/true"}},
	}
}

// install writes the image's description of the distribution.
func (b *bench) install(d Distribution) {
	b.t.Helper()
	file := filepath.Join(b.root, DistributionFile)
	text, err := json.Marshal(d)
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, text, 0o644))
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) wish(name string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.wishes, name), nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) unwish(name string) { _ = os.Remove(filepath.Join(b.wishes, name)) }

func (b *bench) start() Status {
	b.t.Helper()
	s, err := b.Start(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// status asks for the status, which must take less than a second.
func (b *bench) status() Status {
	b.t.Helper()
	began := time.Now()
	s := b.Status()
	if took := time.Since(began); took > time.Second {
		b.t.Errorf("the status took %s", took)
	}
	return s
}

func (b *bench) until(what string, want func(Status) bool) Status {
	b.t.Helper()
	ctx := testenv.Context(b.t)
	for {
		s := b.status()
		if want(s) {
			return s
		}
		if ctx.Err() != nil {
			b.t.Fatalf("not %s: %+v", what, s)
		}
	}
}

func (b *bench) ready() Status {
	b.t.Helper()
	return b.until("ready", func(s Status) bool { return s.NodeReady })
}

func (b *bench) stop() Ended {
	b.t.Helper()
	e, err := b.Stop(testenv.Context(b.t))
	if err != nil {
		b.t.Fatal(err)
	}
	return e
}

// state returns the state of a part.
func (s Status) state(name string) string {
	for _, p := range s.Services {
		if p.Name == name {
			return p.State
		}
	}
	return "none"
}

func TestFromNothingToNothing(t *testing.T) {
	b := newBench(t)
	if s := b.status(); s.Running || s.APIReady || s.Detail != "fake is not running" || s.state("kubelet") != "not_ready" {
		t.Errorf("before the start: %+v", s)
	}
	if _, err := b.Kubeconfig(); !fault.Is(err, fault.NotFound) {
		t.Errorf("kubeconfig before the start: %v", err)
	}
	if s := b.start(); !s.Running || s.NodeReady {
		t.Errorf("the start says %+v", s)
	}
	s := b.ready()
	if !s.APIReady || s.Detail != "Kubernetes is ready" || s.state("kubernetes") != "ready" || s.state("apiserver") != "ready" || s.state("kubelet") != "ready" {
		t.Errorf("ready: %+v", s)
	}
	if k, err := b.Kubeconfig(); err != nil || k.Context != "fake" || !strings.HasPrefix(k.YAML, "ca: ") || k.Endpoint != s.Endpoint {
		t.Errorf("kubeconfig %+v, %v", k, err)
	}
	pid := func() int { st, _ := b.units.Status(UnitName); return st.PID }
	before := pid()
	if s := b.start(); !s.NodeReady || pid() != before {
		t.Errorf("a second start: %+v, process %d after %d", s, pid(), before)
	}
	if e := b.stop(); !e.Stopped || e.Detail != "fake is stopped" {
		t.Errorf("stop: %+v", e)
	}
	if resets, _, restored := b.machine.counts(); resets != 0 || restored != 1 {
		t.Errorf("%d resets, %d restored", resets, restored)
	}
	if e := b.stop(); !e.Stopped || e.Detail != "fake is not running" {
		t.Errorf("a second stop: %+v", e)
	}
}

func TestNotReadySaysWhy(t *testing.T) {
	b := newBench(t)
	for _, w := range []string{wishUnready, wishNode, "kubelet"} {
		b.wish(w)
	}
	b.start()
	s := b.until("waiting for the API", func(s Status) bool { return strings.Contains(s.Detail, "not ok: unready is not") })
	if s.APIReady || !s.Running || strings.Contains(s.Detail, "ping") || !strings.Contains(s.Detail, "no module of that name") {
		t.Errorf("%+v", s)
	}
	b.unwish(wishUnready)
	s = b.until("waiting for the node", func(s Status) bool {
		return strings.Contains(s.Detail, "the API is ready; waiting for node node to be Ready: no network")
	})
	if !s.APIReady || s.NodeReady || s.state("kubelet") != "not_ready" {
		t.Errorf("%+v", s)
	}
	b.unwish(wishNode)
	b.until("waiting for kubelet", func(s Status) bool {
		return s.APIReady && strings.Contains(s.Detail, "waiting for kubelet: HTTP 500: not ok: kubelet is not")
	})
	b.unwish("kubelet")
	b.ready()
}

// TestStatusNeverWaits asks for the status while nothing answers: during the
// start, and during a stop that hangs.
func TestStatusNeverWaits(t *testing.T) {
	b := newBench(t)
	d := b.distribution(freePort(t))
	d.Stop.Timeout = 2
	b.install(d)
	b.wish(wishSlow)
	b.wish(wishHang)
	b.start()
	for range 3 {
		if s := b.status(); s.APIReady || !s.Running {
			t.Errorf("%+v", s)
		}
	}
	b.unwish(wishSlow)
	b.ready()
	b.wish(wishSlow)
	if s := b.status(); !s.NodeReady { // what was seen last
		t.Errorf("%+v", s)
	}
	ended := make(chan Ended)
	go func() { e, _ := b.Stop(testenv.Context(t)); ended <- e }()
	s := b.until("being stopped", func(s Status) bool { return strings.Contains(s.Detail, "fake is being stopped") })
	if s.NodeReady {
		t.Errorf("%+v", s)
	}
	if _, err := b.Start(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a start during the stop: %v", err)
	}
	short, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Stop(short); !errors.Is(err, context.Canceled) {
		t.Errorf("a stop whose caller left: %v", err)
	}
	if e := <-ended; !e.Stopped || !strings.Contains(e.Detail, "killed by signal SIGKILL") {
		t.Errorf("%+v", e)
	}
}

func TestCrashIsTold(t *testing.T) {
	b := newBench(t)
	b.start()
	b.ready()
	api, err := b.WaitAPI(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.wish(wishCrash)
	b.wish("crash-now")
	<-api.Gone()
	s := b.until("crashing", func(s Status) bool { return s.state("kubernetes") == "error" && !s.APIReady })
	if !s.Running || !strings.Contains(s.Detail, "it crashes at once") && !strings.Contains(s.Detail, "the fake was told to") {
		t.Errorf("%+v", s)
	}
	b.unwish("crash-now")
	b.unwish(wishCrash)
	if s := b.ready(); s.Services[0].Crashes == 0 {
		t.Errorf("%+v", s)
	}
	next, err := b.WaitAPI(t.Context())
	if err != nil || next == api {
		t.Fatalf("the API after the crash: %v, %v", next, err)
	}
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/nodes/node?x=1", nil)
	res, err := next.Do(r)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("a request: %v, %v", res, err)
	}
	res.Body.Close()
	b.stop()
	<-next.Gone()
}

func TestWaitAPIWaits(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.WaitAPI(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("without a cluster: %v", err)
	}
	found := make(chan error, 1)
	go func() { _, err := b.WaitAPI(testenv.Context(t)); found <- err }()
	b.start()
	if err := <-found; err != nil {
		t.Error(err)
	}
}

// TestStopRemovesWhatIsLeft is case 8 of the acceptance list as far as it needs
// no cluster: stopped is true only if nothing is left.
func TestStopRemovesWhatIsLeft(t *testing.T) {
	b := newBench(t)
	for name, c := range map[string]struct {
		wish, sticky   string
		left           []string
		stopped        bool
		resets, remove int
		says           string
	}{
		"by a clean end":  {"", "", []string{"cgroup kubepods"}, true, 0, 1, "fake is stopped"},
		"by a bad end":    {wishLeave, "", []string{"mount /a", "chain KUBE-X"}, true, 1, 1, "ended badly (exit status 1)"},
		"and can't go":    {"", "chain KUBE-X", []string{"chain KUBE-X"}, false, 1, 3, "left: chain KUBE-X"},
		"nothing, badly":  {wishLeave, "", nil, true, 0, 0, "ended badly"},
		"very much of it": {wishLeave, "mount /x", manyNames(), false, 1, 3, "left: "},
	} {
		t.Run(name, func(t *testing.T) {
			b.start()
			b.ready()
			resets, removed, _ := b.machine.counts()
			b.machine.mu.Lock()
			b.machine.left, b.machine.sticky = c.left, c.sticky
			b.machine.mu.Unlock()
			if c.wish != "" {
				b.wish(c.wish)
				defer b.unwish(c.wish)
			}
			e := b.stop()
			resetsAfter, removedAfter, _ := b.machine.counts()
			if e.Stopped != c.stopped || !strings.Contains(e.Detail, c.says) || resetsAfter-resets != c.resets || c.remove > 0 && removedAfter == removed {
				t.Errorf("%+v after %d resets, %d removals", e, resetsAfter-resets, removedAfter-removed)
			}
			if len(e.Detail) > 2000 {
				t.Errorf("the detail is %d bytes long", len(e.Detail))
			}
			b.machine.mu.Lock()
			b.machine.left, b.machine.sticky = nil, ""
			b.machine.mu.Unlock()
			if e := b.stop(); !e.Stopped {
				t.Errorf("a stop when nothing is left any more: %+v", e)
			}
		})
	}
}

func manyNames() (all []string) {
	for i := range 500 {
		all = append(all, fmt.Sprintf("mount /var/lib/kubelet/pods/%d", i))
	}
	return all
}

// TestDeleteMakesAnotherCluster is case 9 as far as the guest is concerned.
func TestDeleteMakesAnotherCluster(t *testing.T) {
	b := newBench(t)
	b.start()
	b.ready()
	first, err := b.Kubeconfig()
	if err != nil {
		t.Fatal(err)
	}
	b.stop()
	b.start()
	b.ready()
	if again, err := b.Kubeconfig(); err != nil || again != first {
		t.Errorf("after a stop: %+v, %v", again, err)
	}
	e, err := b.Delete(testenv.Context(t))
	if err != nil || !e.Stopped || e.Detail != "fake is stopped; its data is wiped" {
		t.Fatalf("delete: %+v, %v", e, err)
	}
	if list, err := os.ReadDir(b.data); err != nil || len(list) != 0 {
		t.Errorf("left of the data: %v, %v", list, err)
	}
	if _, err := b.Kubeconfig(); !fault.Is(err, fault.NotFound) {
		t.Errorf("kubeconfig after the delete: %v", err)
	}
	b.start()
	b.ready()
	if second, err := b.Kubeconfig(); err != nil || second.YAML == first.YAML {
		t.Errorf("the new cluster has the old certificate: %+v, %v", second, err)
	}
}

func TestDeleteSaysWhatStays(t *testing.T) {
	b := newBench(t)
	d := b.distribution(freePort(t))
	busy := filepath.Join(b.data, "busy")
	d.Files = []string{b.data + "/../conf"}
	b.install(d)
	if _, err := b.Delete(t.Context()); err == nil {
		t.Error("a path that is not clean was taken")
	}
	d.Files = []string{filepath.Join(filepath.Dir(b.data), "conf")}
	b.install(d)
	for _, dir := range []string{busy, d.Files[0]} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", busy, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(busy, unix.MNT_DETACH)
	e, err := b.Delete(testenv.Context(t))
	if err != nil || !strings.Contains(e.Detail, "but for: unlinkat "+busy) {
		t.Errorf("%+v, %v", e, err)
	}
	if _, err := os.Stat(d.Files[0]); !os.IsNotExist(err) {
		t.Errorf("the file stays: %v", err)
	}
}

// TestParallelCalls has everybody call everything: one process, no deadlock,
// and an end.
func TestParallelCalls(t *testing.T) {
	b := newBench(t)
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			switch i % 10 {
			case 0:
				if e, err := b.Stop(testenv.Context(t)); err != nil || !e.Stopped {
					t.Errorf("stop: %+v, %v", e, err)
				}
			case 1:
				if _, err := b.Delete(testenv.Context(t)); err != nil {
					t.Error(err)
				}
			case 2, 3, 4:
				b.status()
			default:
				if _, err := b.Start(t.Context()); err != nil && !fault.Is(err, fault.Unavailable) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	b.stop()
	b.start()
	b.ready()
}

// TestNextServerGoesOn crashes the agent's server: the next one finds the
// cluster running.
func TestNextServerGoesOn(t *testing.T) {
	b := newBench(t)
	b.start()
	b.ready()
	before, _ := b.units.Status(UnitName)
	b.Cluster.Close()
	b.units.Close()
	p := b.Cluster.p
	b.units = supervise.New(supervise.Params{Cgroups: filepath.Join(cgroupOf(t, before.PID), ".."), Dir: filepath.Dir(p.Mark), Log: p.Log})
	p.Units = b.units
	b.Cluster = New(p)
	if err := b.Recover(); err != nil {
		t.Fatal(err)
	}
	b.ready()
	if after, _ := b.units.Status(UnitName); after.PID != before.PID {
		t.Errorf("process %d after %d", after.PID, before.PID)
	}
	if e := b.stop(); !e.Stopped {
		t.Errorf("%+v", e)
	}
}

func cgroupOf(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
				if _, err := os.Stat(filepath.Join(mount, path, "cgroup.procs")); err == nil {
					return filepath.Join(mount, path)
				}
			}
		}
	}
	t.Fatalf("no cgroup2 in %s", text)
	return ""
}

func TestImagesWithoutACluster(t *testing.T) {
	b := newBench(t)
	if err := os.Remove(filepath.Join(b.root, DistributionFile)); err != nil {
		t.Fatal(err)
	}
	if s := b.status(); s.Running || !strings.Contains(s.Detail, "hutch template build kubernetes") {
		t.Errorf("%+v", s)
	}
	_, startErr := b.Start(t.Context())
	_, stopErr := b.Stop(t.Context())
	_, deleteErr := b.Delete(t.Context())
	_, configErr := b.Kubeconfig()
	for _, err := range []error{startErr, stopErr, deleteErr, configErr} {
		if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "template kubernetes") {
			t.Errorf("error %v", err)
		}
	}
}
