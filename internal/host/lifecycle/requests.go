package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Create implements Sandboxes.
func (m *Manager) Create(ctx context.Context, id sandbox.ID, spec sandbox.Spec) (View, error) {
	fresh := id == ""
	if fresh {
		id = sandbox.NewID()
	} else if _, err := sandbox.ParseID(string(id)); err != nil {
		return View{}, fault.BadField("sandbox_id", "%v", err)
	}
	for {
		if err := context.Cause(ctx); err != nil {
			return View{}, err
		}
		b, again, err := m.createOrJoin(id, spec, fresh)
		if err != nil {
			return View{}, err
		}
		if again {
			if err := b.waitGone(ctx); err != nil {
				return View{}, err
			}
			continue
		}
		if err := b.waitMade(ctx); err != nil {
			return View{}, err
		}
		return b.view(), nil
	}
}

// waitMade waits until a sandbox is made, and returns why it could not be.
func (b *box) waitMade(ctx context.Context) error {
	select {
	case <-b.made:
		return b.makeErr
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// createOrJoin starts a new sandbox, or finds the one that the same request
// made before. again says that one of that id is on its way out, fresh that no
// caller knows the id.
func (m *Manager) createOrJoin(id sandbox.ID, spec sandbox.Spec, fresh bool) (b *box, again bool, err error) {
	src, err := m.hold(spec)
	if err != nil {
		// A repeated request must find its sandbox when the template is gone.
		if b := m.lookup(id); b != nil && same(fillFrom(spec, b.pub.Load().rec.Spec), b.pub.Load().rec.Spec) {
			return m.join(b, b.pub.Load().rec.Spec)
		}
		return nil, false, err
	}
	isNew := false
	defer func() {
		if !isNew { // else it is the boot's
			src.release()
		}
	}()
	spec, err = validate(src.complete(spec), m.p.Driver.Caps().MaxVCPUs)
	if err != nil {
		return nil, false, err
	}
	if b := m.lookup(id); b != nil {
		return m.join(b, spec)
	}
	if err := src.check(spec); err != nil {
		return nil, false, err
	}
	if err := checkCaps(spec, m.p.Driver.Caps()); err != nil {
		return nil, false, err
	}
	if err := m.allowShares(spec); err != nil {
		return nil, false, err
	}
	o, err := m.planCreate(src, spec)
	if err != nil {
		return nil, false, err
	}
	if fresh && o.spare() {
		if b := m.spares.claim(o, spec); b != nil {
			return b, false, nil
		}
	}
	grant, turn, err := m.admitCreate(spec.MemoryMB)
	if err != nil {
		return nil, false, err
	}
	b, isNew, err = m.launchNew(newRecord(id, spec, src), o, grant, turn)
	if err != nil {
		return nil, false, err
	}
	if !isNew {
		return m.join(b, spec)
	}
	return b, false, nil
}

// admitCreate takes room for a new sandbox. Where there is none, what hutchd
// started ahead makes some.
func (m *Manager) admitCreate(memoryMB int) (*grant, *turn, error) {
	g, t, err := m.admission.admit(memoryMB, true)
	if fault.Is(err, fault.Exhausted) && m.makeRoom() {
		g, t, err = m.admission.admit(memoryMB, true)
	}
	return g, t, err
}

// makeRoom ends what hutchd started ahead, and tells whether there was any.
func (m *Manager) makeRoom() bool {
	spares, builds := m.spares.drop(), m.warm.giveWay()
	return spares || builds
}

// planCreate says how a sandbox is to be made. The boot has neither a box nor a
// turn yet.
func (m *Manager) planCreate(src source, spec sandbox.Spec) (*boot, error) {
	o := &boot{op: "create", image: src.image, release: src.release}
	var err error
	switch {
	case src.still != nil && !spec.ColdStart: // and no shares, see source.check
		o.still, o.onlyCopy = src.still, true
		o.kernel, err = m.kernelOf(src.still.snap.Fits.KernelID)
		return o, err
	case src.still != nil:
		o.data = src.still.snap.CopyData
	}
	if o.kernel, err = m.p.Kernel(); err != nil {
		return nil, fmt.Errorf("find kernel: %w", err)
	}
	if src.still != nil || spec.ColdStart || len(spec.Shares) > 0 {
		return o, nil
	}
	shape := m.shape(spec, src.template, o.kernel)
	o.still = m.stock.warm(shape)
	o.after = func() {
		if o.still == nil {
			m.warm.wish(shape, spec)
			return
		}
		m.spares.wish(o.still)
	}
	return o, nil
}

// launchNew adds a sandbox that is made as o says, unless there is one of that
// id. What was admitted is the sandbox's then, or given back.
func (m *Manager) launchNew(rec sandbox.Record, o *boot, g *grant, t *turn) (b *box, isNew bool, err error) {
	b, isNew, err = m.enter(rec, g, func(b *box) func() {
		o.box, o.turn = b, t
		return func() { b.create(o) }
	})
	if err != nil || !isNew {
		t.end()
		g.release()
	}
	return b, isNew, err
}

// enter adds a sandbox and starts its driver, unless there is one of that id.
func (m *Manager) enter(rec sandbox.Record, g *grant, first func(*box) func()) (b *box, isNew bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.openLocked(); err != nil {
		return nil, false, err
	}
	if b := m.boxes[rec.ID]; b != nil {
		return b, false, nil
	}
	if q, ok := m.quarantined[rec.ID]; ok {
		return nil, false, fault.As(fault.Exists, quarantineErr(q))
	}
	hidden := rec.Spec.Purpose != ""
	if err := m.oneMoreLocked(); err != nil && !hidden {
		return nil, false, err
	}
	b = m.newBox(rec)
	b.hidden = hidden
	b.grant = g
	m.boxes[rec.ID] = b
	work := first(b)
	m.wg.Go(func() { b.drive(work) })
	return b, true, nil
}

// oneMoreLocked tells whether one more sandbox is allowed. m.mu is held.
func (m *Manager) oneMoreLocked() error {
	there := 0
	for _, b := range m.boxes {
		if !b.hidden {
			there++
		}
	}
	if most := m.p.Limits.MaxSandboxes; most > 0 && there >= most {
		return fault.New(fault.Exhausted, "there are %d sandboxes and no more are allowed; destroy one or try later", there)
	}
	return nil
}

// join checks that a request is the one that made b.
func (m *Manager) join(b *box, spec sandbox.Spec) (_ *box, again bool, err error) {
	rec := b.pub.Load().rec
	switch {
	case rec.State == sandbox.Destroying || rec.State == sandbox.Gone:
		return b, true, nil
	case !same(spec, rec.Spec):
		return nil, false, fault.New(fault.Exists, "sandbox %s exists and was made by another request", b.id)
	case rec.State == sandbox.Broken:
		return nil, false, denied(b.id, "sandbox is broken; destroy it, which tries the failed clean-up again")
	}
	return b, false, nil
}

func (m *Manager) lookup(id sandbox.ID) *box {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boxes[id]
}

// fillFrom fills in what a spec leaves open from another one.
func fillFrom(s, from sandbox.Spec) sandbox.Spec {
	s.Template = orElse(s.Template, sandbox.DefaultTemplate)
	s.VCPUs = orElse(s.VCPUs, from.VCPUs)
	s.MemoryMB = orElse(s.MemoryMB, from.MemoryMB)
	s.DiskMB = orElse(s.DiskMB, from.DiskMB)
	s = s.WithDefaults()
	if p, err := normal(s.Network); err == nil {
		s.Network = p
	}
	if shares, err := checkShares(s.Shares); err == nil {
		s.Shares = shares
	}
	return s
}

func newRecord(id sandbox.ID, spec sandbox.Spec, src source) sandbox.Record {
	now := time.Now()
	t := src.template
	rec := sandbox.Record{
		Version: sandbox.RecordVersion, ID: id, Spec: spec,
		State: sandbox.Pending, Cause: sandbox.ByUser,
		CreatedAt: now, ChangedAt: now, ActiveAt: now,
		ImageDigest: t.ImageDigest, Env: ownMap(t.Env), User: t.User, Cwd: t.Cwd,
		MachineID: randomHex(16),
	}
	if src.still != nil {
		rec.Snapshot = src.still.snap.ID
	}
	return rec
}

// waitGone waits until a sandbox that is on its way out is gone, or stays.
func (b *box) waitGone(ctx context.Context) error {
	for {
		p := b.pub.Load()
		if p.rec.State == sandbox.Gone {
			// Its driver is done with it, and with the list of sandboxes.
			select {
			case <-b.ended:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if p.rec.State != sandbox.Destroying {
			return nil
		}
		if err := b.await(ctx, p); err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
	}
}

// create is the driver's first work for a new sandbox.
func (b *box) create(o *boot) {
	defer o.release()
	failed, left := o.create()
	if failed == nil {
		if o.after != nil {
			o.after()
		}
		return
	}
	b.makeErr = failed
	if left == nil {
		left = b.m.p.Records.Remove(b.id)
	}
	if left != nil {
		b.makeErr = fmt.Errorf("%w (and not all could be taken back, destroy it: %w)", failed, left)
		b.breakDown(b.causeOf(failed), b.makeErr)
		return
	}
	told := len(o.stages) > 0
	b.vanish(b.causeOf(failed), reasonOf(failed), told)
}

// causeOf tells who made a start fail.
func (b *box) causeOf(err error) sandbox.Cause {
	if a := b.destroyAsked(); a != nil {
		return a.cause
	}
	if errors.As(err, &vmDied{}) {
		return sandbox.ByCrash
	}
	return sandbox.ByHost
}

func reasonOf(err error) string { return printable(err.Error(), 2048) }

// Pause implements Sandboxes.
func (m *Manager) Pause(ctx context.Context, id sandbox.ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	return b.ask(ctx, sandbox.Pause, false, func() error { return b.pause(sandbox.ByUser, "") })
}

func (b *box) pause(cause sandbox.Cause, reason string) error {
	ctx, cancel := b.op()
	defer cancel()
	if err := b.at(ctx, "pause"); err != nil {
		return err
	}
	if err := b.vm.Pause(ctx); err != nil {
		return b.unsure(fmt.Errorf("pause sandbox %s: %w", b.id, err))
	}
	// What is in flight stands still from here on.
	b.mu.Lock()
	if b.inFlight > 0 {
		b.activeAt = time.Now()
	}
	b.mu.Unlock()
	return b.commit(change{to: sandbox.Paused, cause: cause, reason: reason})
}

// unsure is for a pause or resume that failed: the VMM is asked which it is
// now, and err is returned.
func (b *box) unsure(err error) error {
	ctx, cancel := b.op()
	defer cancel()
	running, askErr := b.vm.Running(ctx)
	if askErr != nil {
		return errors.Join(err, askErr)
	}
	if running == (b.rec.State == sandbox.Running) {
		return err
	}
	to := sandbox.Paused
	if running {
		to = sandbox.Running
	}
	return errors.Join(err, b.commit(change{to: to, cause: sandbox.ByHost, reason: reasonOf(err)}))
}

// Resume implements Sandboxes. What has no memory any more boots again from
// its disk.
func (m *Manager) Resume(ctx context.Context, id sandbox.ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	b.interrupt()
	return b.ask(ctx, sandbox.Resume, false, func() error { return b.resume("") })
}

// resume tells reason with the states on its way.
func (b *box) resume(reason string) error {
	switch b.rec.State {
	case sandbox.Paused:
		return b.unpause(sandbox.ByUser, reason)
	case sandbox.Stopped, sandbox.Failed:
		return b.reboot()
	case sandbox.Hibernated:
		return b.restore(reason)
	case sandbox.Pending, sandbox.Running, sandbox.Broken, sandbox.Destroying, sandbox.Gone:
	}
	return fault.New(fault.Internal, "sandbox %s can't be resumed while %s", b.id, b.rec.State)
}

func (b *box) unpause(cause sandbox.Cause, reason string) error {
	ctx, cancel := b.op()
	defer cancel()
	if err := b.at(ctx, "unpause"); err != nil {
		return err
	}
	if err := b.vm.Resume(ctx); err != nil {
		return b.unsure(fmt.Errorf("resume sandbox %s: %w", b.id, err))
	}
	b.active()
	err := b.commit(change{to: sandbox.Running, cause: cause, reason: reason})
	b.clock.soon()
	return err
}

// reboot boots a sandbox again. When that fails it is where it was before,
// with its disk, but in error.
func (b *box) reboot() error {
	image, err := b.m.p.Templates.Image(b.rec.ImageDigest)
	if err != nil {
		return fmt.Errorf("resume sandbox %s: find its image: %w", b.id, err)
	}
	pack, err := b.m.p.Kernel()
	if err != nil {
		return fmt.Errorf("resume sandbox %s: find kernel: %w", b.id, err)
	}
	grant, turn, err := b.m.admission.admit(b.rec.Spec.MemoryMB, false)
	if err != nil {
		return err
	}
	b.grant = grant
	o := &boot{box: b, op: "resume", image: image, kernel: pack, turn: turn}
	failed, left := o.run(o.rebootSteps())
	turn.end()
	switch {
	case failed == nil:
		return nil
	case left != nil:
		err := fmt.Errorf("%w (and not all could be taken back, destroy it: %w)", failed, left)
		b.breakDown(b.causeOf(failed), err)
		return err
	}
	b.grant.release()
	b.grant = nil
	if len(o.stages) > 0 { // else it never left the state it is in
		err = b.commit(change{to: sandbox.Failed, cause: b.causeOf(failed), reason: reasonOf(failed)})
	}
	return errors.Join(failed, err)
}

// Use implements Sandboxes.
func (m *Manager) Use(ctx context.Context, id sandbox.ID) (g guestconn.Guest, done func(), err error) {
	b, err := m.find(id)
	if err != nil {
		return nil, nil, err
	}
	defer b.want()()
	for {
		if err := b.awaken(ctx); err != nil {
			return nil, nil, err
		}
		err = b.ask(ctx, sandbox.Use, true, func() error {
			g, done = b.guest, b.begin()
			return nil
		})
		switch {
		case err == nil:
			return g, done, nil
		case !fault.Is(err, fault.Precondition) || !usable(b.pub.Load().rec): // else it slept for a moment
			return nil, nil, err
		}
	}
}

// KeepAlive implements Sandboxes. A sandbox that can't be used can't be kept
// alive either, and is not resumed for it.
func (m *Manager) KeepAlive(ctx context.Context, id sandbox.ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	return b.ask(ctx, sandbox.Use, true, func() error {
		b.active()
		return nil
	})
}
