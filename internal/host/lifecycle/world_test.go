package lifecycle

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

var (
	errKilled   = errors.New("this hutchd was killed")
	errInjected = errors.New("injected failure")
)

// world is a host: what is in it outlives every hutchd.
type world struct {
	root, run string

	mu       sync.Mutex
	bootID   string
	nextPID  int
	vms      map[int]*machine // alive, by pid
	exits    map[int]vmm.Exit // of those that ended and left a trace of how
	daemons  map[int]*daemon  // of shares, alive, by pid
	launched int
	slots    map[int]bool
	policies map[int]sandbox.Policy
	events   []sandbox.Event
	changed  chan struct{}
	silent   bool   // guests don't say hello
	deaf     bool   // guests don't shut down
	noMounts bool   // guests can't mount shares
	lacks    string // why guests can't have Docker; empty: they can
	crashes  uint32 // how often what guests start has ended
	capacity Capacity
}

// machine is a VM of the world.
type machine struct {
	w        *world
	spec     vmm.Spec
	ident    sandbox.Machine
	running  bool   // guarded by w.mu
	held     bool   // by a quiesce; guarded by w.mu
	memory   string // what the guest knows
	starting string // what it was asked to bring up; guarded by w.mu
	exit     vmm.Exit
	done     chan struct{}
	full     chan struct{} // closed when it stands for want of room; guarded by w.mu
}

func newWorld(t testing.TB) *world {
	t.Helper()
	// Records are synced: in memory that costs nothing.
	base, err := os.MkdirTemp("/dev/shm", "hutch-lifecycle-")
	if err != nil {
		base = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	return &world{
		root: filepath.Join(base, "root"), run: filepath.Join(base, "run"), bootID: "boot-1", nextPID: 100,
		vms: map[int]*machine{}, exits: map[int]vmm.Exit{}, daemons: map[int]*daemon{}, slots: map[int]bool{}, policies: map[int]sandbox.Policy{}, changed: make(chan struct{}),
		capacity: Capacity{MemoryMB: 1 << 20, DiskMB: 1 << 20},
	}
}

func (w *world) end(vm *machine, e vmm.Exit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.vms[vm.ident.Process.PID] != vm {
		return
	}
	delete(w.vms, vm.ident.Process.PID)
	vm.exit = e
	w.exits[vm.ident.Process.PID] = e
	close(vm.done)
}

// vm returns the only VM of a sandbox.
func (w *world) vm(t testing.TB, id sandbox.ID) *machine {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []*machine
	for _, vm := range w.vms {
		if vm.spec.ID == id {
			found = append(found, vm)
		}
	}
	if len(found) != 1 {
		t.Fatalf("sandbox %s has %d VMs, want one", id, len(found))
	}
	return found[0]
}

// reboot is a restart of the host.
func (w *world) reboot() {
	w.mu.Lock()
	vms := w.vms
	w.vms, w.slots, w.bootID = map[int]*machine{}, map[int]bool{}, w.bootID+"+"
	w.daemons = map[int]*daemon{}
	w.mu.Unlock()
	for _, vm := range vms {
		close(vm.done)
	}
	os.RemoveAll(w.run)
}

func (w *world) told() []sandbox.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.events)
}

// story is what was told of a sandbox, as "state/cause".
func (w *world) story(id sandbox.ID) []string {
	var s []string
	for _, e := range w.told() {
		if e.ID == id {
			s = append(s, string(e.State)+"/"+string(e.Cause))
		}
	}
	return s
}

// checkEmpty fails the test when anything of a sandbox is left.
func (w *world) checkEmpty(t testing.TB) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for pid, vm := range w.vms {
		t.Errorf("VM %d of %s is left", pid, vm.spec.ID)
	}
	for pid, d := range w.daemons {
		t.Errorf("server %d of share %d of %s is left", pid, d.at.Index, d.at.ID)
	}
	for slot := range w.slots {
		t.Errorf("network slot %d is left", slot)
	}
	for _, dir := range []string{filepath.Join(w.root, "sandboxes"), filepath.Join(w.run, "sandboxes")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range entries {
			t.Errorf("%s is left", filepath.Join(dir, e.Name()))
		}
	}
}

// checkWhole fails the test unless what the world holds is just what the
// sandboxes in views need.
func (w *world) checkWhole(t testing.TB, views []View) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	slots, pids := map[int]bool{}, map[int]bool{}
	for _, v := range views {
		if has := v.Machine != nil; has != (v.State == sandbox.Running || v.State == sandbox.Paused) {
			t.Errorf("%s is %s and has VM: %v", v.ID, v.State, has)
		}
		if v.Machine != nil {
			pids[v.Pid] = true
			slots[v.Slot] = true
			if w.vms[v.Pid] == nil || !w.slots[v.Slot] {
				t.Errorf("%s lacks its VM %d or its slot %d", v.ID, v.Pid, v.Slot)
			}
			for _, p := range v.ShareServers {
				pids[p.PID] = true
			}
		}
		if v.State == sandbox.Hibernated {
			slots[v.Slot] = true
		}
		s, err := snapshot.Open(filepath.Join(w.root, "sandboxes", string(v.ID), "hibernation"))
		if err == nil {
			err = s.Verify(t.Context())
		}
		if asleep := v.State == sandbox.Hibernated; asleep && err != nil || !asleep && !fault.Is(err, fault.NotFound) {
			t.Errorf("%s is %s, its memory on disk: %v", v.ID, v.State, err)
		}
		if _, err := os.Stat(filepath.Join(w.root, "sandboxes", string(v.ID), "data.img")); err != nil {
			t.Errorf("%s lacks its disk: %v", v.ID, err)
		}
	}
	for pid, vm := range w.vms {
		if !pids[pid] {
			t.Errorf("VM %d of %s is nobody's", pid, vm.spec.ID)
		}
	}
	for pid, d := range w.daemons {
		if !pids[pid] {
			t.Errorf("server %d of share %d of %s is nobody's", pid, d.at.Index, d.at.ID)
		}
	}
	for slot := range w.slots {
		if !slots[slot] {
			t.Errorf("network slot %d is nobody's", slot)
		}
	}
	for _, dir := range []string{filepath.Join(w.root, "sandboxes"), filepath.Join(w.run, "sandboxes")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			i := slices.IndexFunc(views, func(v View) bool { return string(v.ID) == e.Name() })
			if i < 0 || strings.HasPrefix(dir, w.run) && views[i].Machine == nil {
				t.Errorf("%s is nobody's", filepath.Join(dir, e.Name()))
			}
		}
	}
}

// checkSnapshots fails the test unless all snapshots on disk are whole, and
// nothing half-made is beside them.
func (w *world) checkSnapshots(t testing.TB, h *host) {
	t.Helper()
	views := h.Snapshots()
	for _, v := range views {
		if _, err := h.VerifySnapshot(h.c, v.ID); err != nil {
			t.Error(err)
		}
	}
	entries, _ := os.ReadDir(filepath.Join(w.root, "snapshots"))
	for _, e := range entries {
		if !slices.ContainsFunc(views, func(v SnapshotView) bool { return v.ID == e.Name() }) {
			t.Errorf("%s is no snapshot", e.Name())
		}
	}
}

// session is the world as one hutchd has it. When that is killed, nothing it
// does has an effect any more.
type session struct {
	w     *world
	store *store.Store
	log   *slog.Logger

	mu     sync.Mutex
	dead   bool
	calls  int
	names  []string
	faults func(n int, name string) (before, after error)
	holds  atomic.Int64          // images held for creates
	ours   map[int]bool          // slots this hutchd knows to be taken
	gates  map[string]chan error // calls that wait for a word
}

func (w *world) session(t testing.TB) *session {
	t.Helper()
	s, err := store.Open(w.root, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return &session{w: w, store: s, log: log, ours: map[int]bool{}, gates: map[string]chan error{}}
}

// kill plays a SIGKILL of the hutchd that has the session.
func (s *session) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
}

// do is one call to the host.
func (s *session) do(name string, f func() error) error {
	s.mu.Lock()
	n := s.calls
	s.calls++
	s.names = append(s.names, name)
	var before, after error
	if s.faults != nil {
		before, after = s.faults(n, name)
	}
	if before == errKilled {
		s.dead = true
	}
	if s.dead {
		before = errKilled
	}
	s.mu.Unlock()
	if before != nil {
		return before
	}
	err := f()
	if after != nil {
		if after == errKilled {
			s.kill()
		}
		return after
	}
	return err
}

// gate makes calls of that name wait for a word, which is their error.
func (s *session) gate(name string) chan error {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := make(chan error)
	s.gates[name] = g
	return g
}

// pass waits at a gate if there is one.
func (s *session) pass(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil { // nothing is done on a dead context
		return err
	}
	s.mu.Lock()
	g := s.gates[name]
	s.mu.Unlock()
	if g == nil {
		return nil
	}
	select {
	case err := <-g:
		return err
	case <-ctx.Done():
		return ctx.Err() // as a callee that knows no causes
	}
}

func (s *session) params() Params {
	snapshots, err := snapshot.NewStore(filepath.Join(s.w.root, "snapshots"))
	if err != nil {
		panic(err)
	}
	return Params{
		Snapshots: snapshots,
		Driver:    fakeDriver{s}, Slots: fakeSlots{s}, Records: fakeRecords{s}, Memories: fakeRecords{s}, Events: fakeEvents{s},
		Disks: fakeDisks{s}, Templates: fakeTemplates{s}, Shares: fakeShares{s},
		Kernel: func() (kernel.Pack, error) {
			return kernel.Pack{ID: "k1", Kernel: "/k", Initrd: "/i", Modules: "/m"}, nil
		},
		Connect:      func(vm vmm.VM, _ *slog.Logger) guestconn.Guest { return newGuest(s, vm.(*fakeVM).m) },
		ReclaimJails: s.reclaimJails, RunDir: s.w.run, BootID: s.w.bootID, DNS: []string{"192.0.2.53"},
		Capacity: func() (Capacity, error) {
			s.w.mu.Lock()
			defer s.w.mu.Unlock()
			return s.w.capacity, nil
		},
		Log: s.log,
	}
}

func (s *session) reclaimJails(_ context.Context, live func(sandbox.ID) bool) error {
	return s.do("ReclaimJails", func() error {
		s.w.mu.Lock()
		var orphans []*machine
		for _, vm := range s.w.vms {
			if !live(vm.spec.ID) {
				orphans = append(orphans, vm)
			}
		}
		for _, d := range s.w.daemons {
			if !live(d.at.ID) {
				s.w.endDaemon(d)
			}
		}
		s.w.mu.Unlock()
		for _, vm := range orphans {
			s.w.end(vm, vmm.Exit{Reason: vmm.Killed})
		}
		return nil
	})
}

func (f fakeTemplates) Hold(name string) (t template.Template, path string, release func(), err error) {
	switch name {
	case "minimal":
		t = template.Template{Name: name, ImageDigest: "sha256:1", Env: map[string]string{"PATH": "/bin", "A": "template"}, User: "root", Cwd: "/srv"}
	case "big":
		t = template.Template{Name: name, ImageDigest: "sha256:2", VCPUs: 2, MemoryMB: 1024}
	default:
		return t, "", nil, fault.New(fault.NotFound, "template %s does not exist", name)
	}
	path, err = f.Image(t.ImageDigest)
	f.s.holds.Add(1)
	return t, path, sync.OnceFunc(func() { f.s.holds.Add(-1) }), err
}

func (fakeTemplates) Image(digest string) (string, error) {
	if !strings.HasPrefix(digest, "sha256:") {
		return "", fault.New(fault.NotFound, "no image %q", digest)
	}
	return "/images/" + strings.TrimPrefix(digest, "sha256:"), nil
}

func kernelOf(k kernel.Pack) func() (kernel.Pack, error) {
	return func() (kernel.Pack, error) { return k, nil }
}
