package lifecycle

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// bring brings a new sandbox into a state, and returns how to let it go on
// when it is held there.
func bring(t *testing.T, h *host, id sandbox.ID, to sandbox.State) (release func()) {
	t.Helper()
	return bringOf(t, h, id, plain, to)
}

func bringOf(t *testing.T, h *host, id sandbox.ID, spec sandbox.Spec, to sandbox.State) (release func()) {
	t.Helper()
	switch to {
	case sandbox.Pending:
		gate := h.s.gate("Ready")
		made := async(func() error { _, err := h.Create(h.c, id, spec); return err })
		holds(t, "pending", func() bool { return h.state(id) == sandbox.Pending })
		return func() {
			gate <- nil
			h.must(<-made)
		}
	case sandbox.Running:
		h.create(id, spec)
	case sandbox.Paused:
		h.create(id, spec)
		h.must(h.Pause(h.c, id))
	case sandbox.Stopped:
		h.create(id, spec)
		h.w.powerOff(t, id)
		h.reach(id, to)
	case sandbox.Failed:
		h.create(id, spec)
		h.w.crash(t, id)
		h.reach(id, to)
	case sandbox.Broken:
		h.create(id, spec)
		gate := h.s.gate("Release")
		gone := async(func() error { return h.Destroy(h.c, id) })
		gate <- errInjected
		if err := <-gone; !errors.Is(err, errInjected) {
			t.Errorf("destroy: %v", err)
		}
		return func() { close(gate) }
	case sandbox.Destroying:
		h.create(id, spec)
		gate := h.s.gate("VM.Kill")
		gone := async(func() error { return h.Destroy(h.c, id) })
		h.reach(id, to)
		return func() {
			gate <- nil
			h.must(<-gone)
		}
	case sandbox.Hibernated:
		h.create(id, spec)
		h.must(h.Hibernate(h.c, id))
	}
	return func() {}
}

func request1(h *host, r sandbox.Request, id sandbox.ID) error {
	switch r {
	case sandbox.Use:
		_, done, err := h.Use(h.c, id)
		if err == nil {
			done()
		}
		return err
	case sandbox.Pause:
		return h.Pause(h.c, id)
	case sandbox.Resume:
		return h.Resume(h.c, id)
	case sandbox.Hibernate:
		return h.Hibernate(h.c, id)
	case sandbox.Snapshot:
		b, err := h.find(id)
		if err != nil {
			return err
		}
		return b.ask(h.c, r, true, func() error { return nil })
	case sandbox.Destroy:
		return h.Destroy(h.c, id)
	}
	return errors.New("unknown request")
}

// TestEveryCell drives every cell of the state table through the Manager.
func TestEveryCell(t *testing.T) {
	accepted := map[sandbox.Request]sandbox.State{
		sandbox.Use: sandbox.Running, sandbox.Pause: sandbox.Paused, sandbox.Resume: sandbox.Running,
		sandbox.Hibernate: sandbox.Hibernated, sandbox.Destroy: sandbox.Gone,
	}
	for _, state := range sandbox.States() {
		for _, r := range sandbox.Requests() {
			t.Run(fmt.Sprintf("%s/%s", state, r), func(t *testing.T) {
				testenv.CheckGoroutines(t)
				w := newWorld(t)
				const id = "sb-1"
				h := start(t, w)
				release := sync.OnceFunc(bring(t, h, id, state))
				verdict, _ := sandbox.Decide(state, r)
				switch {
				case verdict == sandbox.Deny:
					err := request1(h, r, id)
					wants(t, err, fault.Precondition)
					if !strings.Contains(err.Error(), string(state)) || !strings.Contains(err.Error(), id) {
						t.Errorf("%q names not both the state and the sandbox", err)
					}
				case verdict == sandbox.Wait:
					result := async(func() error { return request1(h, r, id) })
					release()
					if err := <-result; err != nil {
						t.Error(err)
					}
					if want := accepted[r]; want != "" && h.state(id) != want {
						t.Errorf("it is %s, want %s", h.state(id), want)
					}
				case verdict == sandbox.Already && state == sandbox.Destroying:
					result := async(func() error { return request1(h, r, id) })
					release()
					if err := <-result; err != nil && !fault.Is(err, fault.NotFound) { // it may come too late
						t.Error(err)
					}
				case verdict == sandbox.Already:
					h.must(request1(h, r, id))
					if h.state(id) != state {
						t.Errorf("it is %s now", h.state(id))
					}
				case verdict == sandbox.Accept:
					if state == sandbox.Broken {
						release()
					}
					h.must(request1(h, r, id))
					if got := h.state(id); got != accepted[r] && r != sandbox.Snapshot {
						t.Errorf("it is %s now, want %s", got, accepted[r])
					}
					if state == sandbox.Pending { // the create was cut off
						release = func() {}
					}
				}
				release()
				if h.state(id) != sandbox.Gone {
					h.must(h.Destroy(h.c, id))
				}
				w.checkEmpty(t)
				h.stop(true)
			})
		}
	}
}
