package lifecycle

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// A spare is a sandbox that was made before anybody asked for it: a copy of a
// warm template that has been configured, with an identity of its own, and is
// paused. A create without an id takes it, and has only to say what it is to be.
// The id of a sandbox names all that it has on the host, so one that was made
// ahead can't get another.

const (
	// sparePurpose is the purpose of a spare.
	sparePurpose = "spare"
	// spareTime is how long a spare waits for somebody to take it.
	spareTime = 10 * time.Minute
)

// spares owns the spares of a Manager.
type spares struct {
	m *Manager

	mu     sync.Mutex
	ready  []spare                // oldest first; guarded by mu
	making map[string]*spareBuild // by the id of their snapshot; guarded by mu
}

// spareBuild is a spare in the making.
type spareBuild struct {
	unwanted bool          // guarded by mu of spares
	box      *box          // once there is one; guarded by mu of spares
	done     chan struct{} // closed at its end
}

type spare struct {
	of  string // id of a snapshot
	box *box
}

func newSpares(m *Manager) *spares { return &spares{m: m, making: map[string]*spareBuild{}} }

// spare tells whether a spare would do for a create.
func (o *boot) spare() bool { return o.still != nil && o.still.snap.Kind == snapshot.Warm }

// wish has a spare made of a warm template in the background, unless there is
// one.
func (s *spares) wish(from *still) {
	if s.m.p.Warm.Spares <= 0 {
		return
	}
	build := s.begin(from.snap.ID)
	if build == nil {
		return
	}
	s.m.wg.Go(func() {
		b, err := s.make(from, build)
		s.end(from.snap.ID, b)
		if err != nil && s.m.closing.Err() == nil {
			s.m.p.Log.Info("no spare could be made", slog.String("snapshot", from.snap.ID), slog.Any("error", err))
		}
	})
}

// begin begins a spare, which the caller is to make. Nil: none is needed.
func (s *spares) begin(of string) *spareBuild {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = slices.DeleteFunc(s.ready, func(r spare) bool { return r.box.pub.Load().rec.State != sandbox.Paused })
	if s.making[of] != nil || slices.ContainsFunc(s.ready, func(r spare) bool { return r.of == of }) {
		return nil
	}
	build := &spareBuild{done: make(chan struct{})}
	s.making[of] = build
	return build
}

// end takes up what was made; b may be nil. The oldest go when there are too
// many.
func (s *spares) end(of string, b *box) {
	s.mu.Lock()
	defer s.mu.Unlock()
	build := s.making[of]
	delete(s.making, of)
	close(build.done)
	if b == nil {
		return
	}
	if build.unwanted {
		b.askDestroy(sandbox.ByHost, roomNeeded)
		return
	}
	s.ready = append(s.ready, spare{of, b})
	for len(s.ready) > s.m.p.Warm.Spares {
		s.ready[0].box.askDestroy(sandbox.ByHost, "spares of other shapes are in use")
		s.ready = s.ready[1:]
	}
}

// make makes a spare when nothing else starts.
func (s *spares) make(from *still, build *spareBuild) (_ *box, err error) {
	release, ok := from.hold()
	if !ok {
		return nil, fault.New(fault.NotFound, "warm template %s is being removed", from.snap.ID)
	}
	defer release()
	if err := s.m.admission.whenCalm(s.m.closing); err != nil {
		return nil, err
	}
	o, rec, err := s.plan(from)
	if err != nil {
		return nil, err
	}
	b, err := s.launch(rec, o, build)
	if err != nil {
		o.release()
		return nil, err
	}
	if err := b.waitMade(s.m.life); err != nil {
		return nil, err
	}
	if err := b.ask(s.m.life, sandbox.Pause, true, b.rest); err != nil {
		b.askDestroy(sandbox.ByHost, reasonOf(err))
		return nil, err
	}
	return b, nil
}

func (s *spares) launch(rec sandbox.Record, o *boot, build *spareBuild) (*box, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if build.unwanted {
		return nil, fault.New(fault.Exhausted, roomNeeded)
	}
	grant, turn, err := s.m.admission.admit(rec.Spec.MemoryMB, true)
	if err != nil {
		return nil, err
	}
	build.box, _, err = s.m.launchNew(rec, o, grant, turn)
	return build.box, err
}

func (s *spares) plan(from *still) (*boot, sandbox.Record, error) {
	shape := shapeOf(from.snap)
	src, err := s.m.hold(shape)
	if err != nil {
		return nil, sandbox.Record{}, err
	}
	spec := bareSpec(shape, sparePurpose)
	spec.Timeout, spec.OnTimeout = spareTime, sandbox.DestroyOnTimeout
	o := &boot{op: "spare", image: src.image, release: src.release, still: from, onlyCopy: true}
	if o.kernel, err = s.m.kernelOf(from.snap.Fits.KernelID); err != nil {
		src.release()
		return nil, sandbox.Record{}, err
	}
	return o, newRecord(sandbox.NewID(), spec, src), nil
}

// rest has a spare do once what it will be asked first, and pauses it.
func (b *box) rest() error {
	ctx, cancel := b.op()
	defer cancel()
	b.exercise(ctx)
	b.clock.stop()
	b.clock = nil
	if err := b.vm.Pause(ctx); err != nil {
		return fmt.Errorf("pause spare: %w", err)
	}
	return b.commit(change{to: sandbox.Paused, cause: sandbox.ByHost})
}

// claim makes a spare what a create asks for. Nil: there is none, or it did not
// work, and o says how long that took.
func (s *spares) claim(o *boot, spec sandbox.Spec) *box {
	b := s.take(o.still.snap.ID)
	if b == nil {
		return nil
	}
	began := time.Now()
	// Not by the caller's context: what has begun comes to its end.
	err := b.ask(s.m.life, sandbox.Resume, true, func() error { return b.become(o, spec) })
	if err == nil {
		s.wish(o.still)
		return b
	}
	s.m.p.Log.Warn("a spare could not be used", slog.String("sandbox_id", string(b.id)), slog.Any("error", err))
	b.askDestroy(sandbox.ByHost, reasonOf(err))
	o.stages = []sandbox.Stage{{Name: "spare failed", Took: time.Since(began)}}
	return nil
}

func (s *spares) take(of string) *box {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.ready, func(r spare) bool { return r.of == of })
	if i < 0 {
		return nil
	}
	b := s.ready[i].box
	s.ready = slices.Delete(s.ready, i, i+1)
	return b
}

// become is the driver's turn in which a spare gets its spec.
func (b *box) become(from *boot, spec sandbox.Spec) error {
	o := &boot{box: b, op: "claim", still: from.still}
	failed, left := o.run([]step{
		{"spare", func(ctx context.Context) error { return o.claim(ctx, spec) }},
		{"configure", o.configure},
		{"running", o.becomeRunning},
	})
	if failed != nil {
		return fmt.Errorf("%w (%v)", failed, left)
	}
	return nil
}

// claim gives a spare its spec, and lets it run. A hutchd that is killed from
// here on leaves a create that was cut off.
func (o *boot) claim(ctx context.Context, spec sandbox.Spec) error {
	if err := o.m.unhide(o.box); err != nil {
		return err
	}
	was := o.rec.Spec.Network
	o.rec.Spec, o.rec.Boots, o.rec.CreatedAt = spec, 0, time.Now()
	if err := o.commit(change{to: sandbox.Pending, cause: sandbox.ByUser, must: true}); err != nil {
		return err
	}
	if !samePolicy(was, spec.Network) {
		if err := o.m.p.Slots.SetPolicy(ctx, o.rec.Slot, spec.Network); err != nil {
			return err
		}
	}
	return o.vm.Resume(ctx)
}

// unhide makes a sandbox of hutchd's own a caller's, if one more is allowed.
func (m *Manager) unhide(b *box) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.oneMoreLocked(); err != nil {
		return err
	}
	b.hidden = false
	return nil
}

// retire destroys the spares of a snapshot that was replaced.
func (s *spares) retire(of string) {
	const why = "what it is a copy of was replaced"
	s.mu.Lock()
	defer s.mu.Unlock()
	if build := s.making[of]; build != nil {
		build.unwanted = true
		if build.box != nil {
			build.box.askDestroy(sandbox.ByHost, why)
		}
	}
	s.ready = slices.DeleteFunc(s.ready, func(r spare) bool {
		if r.of == of {
			r.box.askDestroy(sandbox.ByHost, why)
		}
		return r.of == of
	})
}

// drop destroys all spares, those in the making too, and tells whether there
// were any.
func (s *spares) drop() bool {
	s.mu.Lock()
	var boxes []*box
	for _, r := range s.ready {
		boxes = append(boxes, r.box)
	}
	s.ready = nil
	var ends []<-chan struct{}
	for _, build := range s.making {
		build.unwanted = true
		if build.box != nil { // else it has no room yet
			boxes, ends = append(boxes, build.box), append(ends, build.done)
		}
	}
	s.mu.Unlock()
	for _, b := range boxes {
		if a := b.askDestroy(sandbox.ByHost, roomNeeded); a != nil {
			ends = append(ends, a.done)
		}
	}
	for _, end := range ends {
		<-end
	}
	return len(ends) > 0
}
