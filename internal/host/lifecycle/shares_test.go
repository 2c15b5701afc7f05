package lifecycle

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/share"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// daemon is the server of a share in the world. It does not end with its VM.
type daemon struct {
	at    share.Place
	ident sandbox.Process
	done  chan struct{}
}

// endDaemon is called with w.mu held.
func (w *world) endDaemon(d *daemon) {
	if w.daemons[d.ident.PID] == d {
		delete(w.daemons, d.ident.PID)
		close(d.done)
	}
}

// crashDaemon ends the server of a share.
func (w *world) crashDaemon(t testing.TB, id sandbox.ID, index int) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.daemons {
		if d.at.ID == id && d.at.Index == index {
			w.endDaemon(d)
			return
		}
	}
	t.Errorf("share %d of %s has no server", index, id)
}

func (w *world) daemonsOf(id sandbox.ID) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.daemons {
		if d.at.ID == id {
			n++
		}
	}
	return n
}

type fakeShares struct{ s *session }

// Check allows what is below /srv.
func (f fakeShares) Check(shares []sandbox.Share) error {
	for _, s := range shares {
		if !strings.HasPrefix(s.HostPath, "/srv/") {
			return fault.New(fault.Precondition, "%s is not shared", s.HostPath)
		}
	}
	return nil
}

func (f fakeShares) Serve(ctx context.Context, s sandbox.Share, at share.Place) (server share.Server, conn *os.File, err error) {
	if err := errors.Join(f.s.pass(ctx, "Shares.Serve"), f.Check([]sandbox.Share{s})); err != nil {
		return nil, nil, err
	}
	if _, err := os.Stat(at.Dir); err != nil {
		return nil, nil, err
	}
	err = f.s.do("Shares.Serve", func() error {
		w := f.s.w
		w.mu.Lock()
		defer w.mu.Unlock()
		w.nextPID++
		d := &daemon{at: at, ident: sandbox.Process{PID: w.nextPID, StartTicks: 1, BootID: w.bootID}, done: make(chan struct{})}
		w.daemons[d.ident.PID] = d
		server = &fakeServer{f.s, d}
		conn, err = os.Open(os.DevNull)
		return err
	})
	if err != nil {
		return nil, nil, err // after the effect: as a hutchd that died then
	}
	return server, conn, nil
}

func (f fakeShares) Adopt(_ context.Context, p sandbox.Process, at share.Place) (server share.Server, err error) {
	err = f.s.do("Shares.Adopt", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		d := f.s.w.daemons[p.PID]
		if d == nil || d.ident != p || d.at.ID != at.ID || d.at.Index != at.Index {
			return fault.New(fault.NotFound, "no process %d", p.PID)
		}
		server = &fakeServer{f.s, d}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return server, nil
}

type fakeServer struct {
	s *session
	d *daemon
}

func (f *fakeServer) ID() sandbox.Process   { return f.d.ident }
func (f *fakeServer) Done() <-chan struct{} { return f.d.done }
func (f *fakeServer) Why() string           { return "it was made to" }
func (f *fakeServer) Close() error          { return nil }

func (f *fakeServer) Kill(ctx context.Context) error {
	if err := f.s.pass(ctx, "Shares.Kill"); err != nil {
		return err
	}
	return f.s.do("Shares.Kill", func() error {
		f.s.w.mu.Lock()
		defer f.s.w.mu.Unlock()
		f.s.w.endDaemon(f.d)
		return nil
	})
}

// sharing is plain with two shares.
func sharing() sandbox.Spec {
	s := plain
	s.Shares = []sandbox.Share{{HostPath: "/srv/b", GuestPath: "/mnt/b", ReadOnly: true}, {HostPath: "/srv/a", GuestPath: "/mnt/a"}}
	return s
}

func TestSharesAreServedWhileThereIsAMachine(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	v := h.create("sb-1", sharing())
	if d := cmp.Diff([]sandbox.Share{{HostPath: "/srv/a", GuestPath: "/mnt/a"}, {HostPath: "/srv/b", GuestPath: "/mnt/b", ReadOnly: true}}, v.Spec.Shares); d != "" {
		t.Errorf("shares (-want +got):\n%s", d)
	}
	h.create("sb-1", sharing()) // in whatever order
	if n := w.daemonsOf("sb-1"); n != 2 {
		t.Errorf("%d servers", n)
	}
	if spec := w.vm(t, "sb-1").spec; len(spec.Shares) != 2 || spec.Shares[0].Tag != share.Tag(0) || spec.Shares[0].Conn == nil {
		t.Errorf("machine with shares %+v", spec.Shares)
	}
	h.must(h.Pause(h.c, "sb-1"))
	h.must(h.Resume(h.c, "sb-1"))
	h.w.powerOff(t, "sb-1")
	h.reach("sb-1", sandbox.Stopped)
	holds(t, "no server is left", func() bool { return w.daemonsOf("sb-1") == 0 })
	h.must(h.Resume(h.c, "sb-1"))
	w.checkWhole(t, h.List())
	h.must(h.Destroy(h.c, "sb-1"))
	w.checkEmpty(t)
	h.stop(true)
}

func TestSharesKilledAtEveryCall(t *testing.T) {
	killEverywhere(t, func(h *host) {
		const id = "sb-1"
		_, err := h.Create(h.c, id, sharing())
		for _, f := range []func() error{
			func() error { return h.Pause(h.c, id) },
			func() error { return h.Resume(h.c, id) },
			func() error { return h.Destroy(h.c, id) },
		} {
			if err != nil {
				return
			}
			err = f()
		}
	})
}

func TestSharesAreNotCopied(t *testing.T) {
	w := newWorld(t)
	h := start(t, w, func(p *Params) { p.Warm.Auto, p.Warm.Spares = true, 1 })
	h.create("sb-1", plain)
	holds(t, "the shape is warm", func() bool { return len(h.Snapshots()) == 1 })
	if v := h.create("sb-2", sharing()); v.Snapshot != "" {
		t.Error("a sandbox with shares was copied")
	}
	_, _, snapErr := h.CreateSnapshot(h.c, "sb-2", "snap")
	_, forkErr := h.Fork(h.c, "sb-2", 1)
	for what, err := range map[string]error{"hibernated": h.Hibernate(h.c, "sb-2"), "forked": forkErr, "snapshot": snapErr} {
		wants(t, err, fault.Precondition)
		if err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), whyBound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if h.state("sb-2") != sandbox.Running || !w.vm(t, "sb-2").running {
		t.Error("it does not run any more")
	}
	_, _, err := h.CreateSnapshot(h.c, "sb-1", "snap")
	h.must(err)
	spec := sharing()
	spec.Template = "snap"
	_, err = h.Create(h.c, "sb-3", spec)
	wants(t, err, fault.Invalid)
	spec.ColdStart = true
	h.create("sb-3", spec)
}

func TestSharesThatAreNoneAreRefused(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	at := func(host, guest string) sandbox.Share { return sandbox.Share{HostPath: host, GuestPath: guest} }
	for name, shares := range map[string][]sandbox.Share{
		"many":     make([]sandbox.Share, maxShares+1),
		"relative": {at("srv/a", "/mnt/a")}, "unclean": {at("/srv/../etc", "/mnt/a")}, "slash": {at("/srv/a", "/mnt/a/")},
		"control": {at("/srv/a", "/mnt/\n")}, "zero": {at("/srv/a\x00", "/mnt/a")}, "long": {at("/srv/a", "/"+strings.Repeat("x", maxPath))},
		"root": {at("/srv/a", "/")}, "system": {at("/srv/a", "/etc/x")}, "proc": {at("/srv/a", "/proc")}, "docker": {at("/srv/a", "/var/lib/docker/x")}, "home": {at("/srv/a", "/root")},
		"twice": {at("/srv/a", "/mnt/a"), at("/srv/b", "/mnt/a")}, "nested": {at("/srv/a", "/mnt/a/b"), at("/srv/b", "/mnt/a")},
	} {
		spec := plain
		spec.Shares = shares
		_, err := h.Create(h.c, "", spec)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	spec := sharing()
	spec.Timeout, spec.OnTimeout = 1e9, sandbox.HibernateOnTimeout
	_, err := h.Create(h.c, "", spec)
	wants(t, err, fault.Invalid)
	spec = plain
	spec.Shares = []sandbox.Share{at("/etc", "/mnt/a")}
	_, err = h.Create(h.c, "", spec)
	wants(t, err, fault.Precondition)
	spec.Shares = []sandbox.Share{at("/srv/a", "/mnt/a b"), at("/srv/a", "/mnt/ab"), at("/srv/a", "/tmp/x")}
	h.create("sb-1", spec)
	w.checkWhole(t, h.List())
}

func TestDeadServerIsToldOnce(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", sharing())
	w.crashDaemon(t, "sb-1", 1)
	lost := func() (n int) {
		for _, e := range w.told() {
			if strings.Contains(e.Message, "is lost until the sandbox boots again") {
				n++
			}
		}
		return n
	}
	holds(t, "it is told", func() bool { return lost() == 1 })
	h.reach("sb-1", sandbox.Running)
	h.stop(true)
	w.crashDaemon(t, "sb-1", 0) // while nobody watches
	h = start(t, w)
	if h.state("sb-1") != sandbox.Running || lost() != 2 {
		t.Errorf("%s, told %d times", h.state("sb-1"), lost())
	}
	h.stop(true)
	h = start(t, w)
	if lost() != 2 {
		t.Errorf("told %d times", lost())
	}
	w.powerOff(t, "sb-1")
	h.reach("sb-1", sandbox.Stopped)
	h.must(h.Resume(h.c, "sb-1"))
	if n := w.daemonsOf("sb-1"); n != 2 {
		t.Errorf("%d servers after a boot", n)
	}
	h.must(h.Destroy(h.c, "sb-1"))
	w.checkEmpty(t)
	h.stop(true)
}

func TestServersThatEndWithTheirMachineAreNotLost(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	h.create("sb-1", sharing())
	vm := w.vm(t, "sb-1")
	w.crashDaemon(t, "sb-1", 0)
	w.end(vm, vmm.Exit{Reason: vmm.GuestPowerOff})
	h.reach("sb-1", sandbox.Stopped)
	holds(t, "no server is left", func() bool { return w.daemonsOf("sb-1") == 0 })
	holds(t, "the run directory is gone", func() bool {
		_, err := os.Stat(filepath.Join(w.run, "sandboxes", "sb-1"))
		return errors.Is(err, fs.ErrNotExist)
	})
}

func TestGuestThatCannotMountFailsTheCreate(t *testing.T) {
	w := newWorld(t)
	h := start(t, w)
	w.mu.Lock()
	w.noMounts = true
	w.mu.Unlock()
	_, err := h.Create(h.c, "sb-1", sharing())
	wants(t, err, fault.Unavailable)
	if err == nil || !strings.Contains(err.Error(), "/mnt/a: no such device") {
		t.Error(err)
	}
	w.checkEmpty(t)
}

func TestSharesUnwindAtEveryServer(t *testing.T) {
	w := newWorld(t)
	br := &breaker{step: "create share"}
	h := start(t, w, func(p *Params) { p.Break = br.hook })
	_, err := h.Create(h.c, "sb-1", sharing())
	if !errors.Is(err, errInjected) {
		t.Error(err)
	}
	w.checkEmpty(t)
}
