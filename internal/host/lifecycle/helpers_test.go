package lifecycle

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// host is a hutchd at work in a world.
type host struct {
	*Manager
	s *session
	w *world
	t testing.TB
	c context.Context
}

// start starts a hutchd in a world; change may change its parameters.
func start(t testing.TB, w *world, change ...func(*Params)) *host {
	t.Helper()
	h := prepare(t, w, change...)
	if err := h.Start(h.c); err != nil {
		t.Fatal(err)
	}
	return h
}

func prepare(t testing.TB, w *world, change ...func(*Params)) *host {
	t.Helper()
	s := w.session(t)
	p := s.params()
	for _, c := range change {
		c(&p)
	}
	m, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	h := &host{Manager: m, s: s, w: w, t: t, c: t.Context()}
	t.Cleanup(func() { h.stop(true) })
	return h
}

// stop stops the hutchd in order.
func (h *host) stop(keepVMs bool) {
	h.t.Helper()
	if err := errors.Join(h.Close(context.WithoutCancel(h.c), keepVMs), h.s.store.Close()); err != nil {
		h.t.Error(err)
	}
	if n := h.s.holds.Load(); n != 0 {
		h.t.Errorf("%d images are held, though nothing is made", n)
	}
}

// die plays a SIGKILL: nothing of what goes on then has an effect.
func (h *host) die() {
	h.t.Helper()
	h.s.kill()
	h.stop(true)
}

var plain = sandbox.Spec{VCPUs: 1, MemoryMB: 128, DiskMB: 64}

func (h *host) create(id sandbox.ID, spec sandbox.Spec) View {
	h.t.Helper()
	v, err := h.Create(h.c, id, spec)
	if err != nil {
		h.t.Fatalf("create %s: %v", id, err)
	}
	return v
}

// reach waits until a sandbox is in a state.
func (h *host) reach(id sandbox.ID, want sandbox.State) View {
	h.t.Helper()
	v, err := h.Wait(h.c, id, want)
	if err != nil || v.State != want {
		h.t.Fatalf("%s is %q (%v), want %s", id, v.State, err, want)
	}
	return v
}

func (h *host) state(id sandbox.ID) sandbox.State {
	h.t.Helper()
	v, err := h.Get(string(id))
	switch {
	case fault.Is(err, fault.NotFound):
		return sandbox.Gone
	case err != nil:
		h.t.Fatal(err)
	}
	return v.State
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// wants fails the test unless err has a class.
func wants(t testing.TB, err error, class fault.Class) {
	t.Helper()
	if !fault.Is(err, class) {
		t.Errorf("got %v (%s), want %s", err, fault.Of(err), class)
	}
}

// settled waits until the driver of a sandbox has nothing to do: what it was
// asked before is done.
func (h *host) settled(id sandbox.ID) {
	h.t.Helper()
	b := h.lookup(id)
	if b == nil {
		return
	}
	r := &request{kind: sandbox.Destroy, do: func() error { return nil }, done: make(chan struct{})}
	select {
	case b.inbox <- r:
		<-r.done
	case <-b.ended:
	case <-h.c.Done():
		h.t.Fatalf("driver of %s does not answer", id)
	}
}

// holds waits until a condition holds that is no state and no event.
func holds(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ctx := testenv.Context(t); !cond(); {
		select {
		case <-ctx.Done():
			t.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

// async runs f and returns its result later.
func async(f func() error) <-chan error {
	c := make(chan error, 1)
	go func() { c <- f() }()
	return c
}

func (w *world) powerOff(t testing.TB, id sandbox.ID) {
	t.Helper()
	w.end(w.vm(t, id), vmm.Exit{Reason: vmm.GuestPowerOff})
}

func (w *world) crash(t testing.TB, id sandbox.ID) {
	t.Helper()
	w.end(w.vm(t, id), vmm.Exit{Reason: vmm.Crashed, Detail: "signal 11\n\x1b[31mlast words"})
}

// breaker fails the step of a name, once.
type breaker struct {
	mu   sync.Mutex
	step string
	seen []string
	hit  bool
	wait bool // for the step's context to end, instead of failing
	at   chan struct{}
}

func (b *breaker) hook(ctx context.Context, _ sandbox.ID, step string) error {
	b.mu.Lock()
	b.seen = append(b.seen, step)
	hit := step == b.step && !b.hit
	b.hit = b.hit || hit
	b.mu.Unlock()
	switch {
	case !hit:
		return nil
	case b.wait:
		close(b.at)
		<-ctx.Done()
		return ctx.Err()
	}
	return errInjected
}
