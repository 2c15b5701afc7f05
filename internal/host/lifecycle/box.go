package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/network"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

const (
	// persistEvery is how old the ActiveAt on disk may be.
	persistEvery = time.Minute
	// retryEvery is how soon a record that could not be written is tried again.
	retryEvery = 5 * time.Second
	// opTimeout bounds a pause, a resume from RAM and the like.
	opTimeout = 30 * time.Second
)

// box is one sandbox and its driver goroutine.
type box struct {
	m   *Manager
	id  sandbox.ID
	log *slog.Logger

	pub   atomic.Pointer[published]
	inbox chan *request // unbuffered: what was sent has begun
	kick  chan struct{} // tells the driver to look at what mu guards
	made  chan struct{} // closed when the first work is done: create or recovery
	ended chan struct{} // closed when the driver has ended

	// life ends when a destroy is asked for, with the reason as its cause.
	life context.Context
	doom context.CancelCauseFunc

	mu       sync.Mutex
	attempt  *attempt  // at a destroy; guarded by mu
	hidden   bool      // hutchd's own; guarded by m.mu
	over     bool      // the driver takes nothing any more; guarded by mu
	inFlight int       // uses; guarded by mu
	wanted   int       // uses on their way; guarded by mu
	waking   *request  // a resume for uses; guarded by mu
	rouse    func()    // ends a hibernation on its way, called with mu held; guarded by mu
	light    bool      // a use ends that hibernation too; guarded by mu
	activeAt time.Time // end of the last use and the like; guarded by mu

	// What follows belongs to the driver.

	rec      sandbox.Record
	vm       vmm.VM
	shares   *servedShares
	guest    guestconn.Guest
	clock    *clockSync
	slot     network.Slot // while there is one
	grant    *grant
	gone     bool
	leaving  bool      // hutchd stops
	makeErr  error     // why the create failed; read by others after made
	unsaved  bool      // the record on disk is older than rec
	savedAt  time.Time // when rec was written, or that was tried
	savedAct time.Time // the ActiveAt that was written
	backOff  backOff   // of what a timeout does
	stuck    bool      // paused because the host's disk is full
	lookedAt time.Time // when room on it was looked for
	timer    *time.Timer
}

// published is what readers see; it never changes. changed is closed when
// there is a newer one.
type published struct {
	rec     sandbox.Record
	changed chan struct{}
}

// request is work for the driver's turn.
type request struct {
	kind sandbox.Request
	do   func() error // called when the state accepts the request
	done chan struct{}
	err  error // set before done is closed
}

// attempt is one try to destroy a sandbox, for all who wait for it.
type attempt struct {
	cause  sandbox.Cause
	reason string
	done   chan struct{}
	err    error // set before done is closed
}

func (m *Manager) newBox(rec sandbox.Record) *box {
	b := &box{
		m: m, id: rec.ID, log: m.p.Log.With(slog.String("sandbox_id", string(rec.ID))),
		inbox: make(chan *request), kick: make(chan struct{}, 1),
		made: make(chan struct{}), ended: make(chan struct{}),
		rec: rec, activeAt: rec.ActiveAt,
	}
	b.life, b.doom = context.WithCancelCause(m.life)
	b.publish()
	return b
}

// drive is the driver: it does the first work, then takes turns until the
// sandbox is gone or hutchd stops.
func (b *box) drive(first func()) {
	defer close(b.ended)
	defer b.doom(nil)
	b.timer = time.NewTimer(time.Hour)
	defer b.timer.Stop()
	first()
	close(b.made)
	for !b.gone && !b.leaving {
		b.turn()
	}
	b.mu.Lock()
	b.over = true
	a, w := b.attempt, b.waking
	b.mu.Unlock()
	if w != nil {
		w.err = b.endErr()
		close(w.done)
	}
	if a != nil {
		if !b.gone {
			a.err = stopping()
		}
		close(a.done)
	}
}

// turn waits for the next thing to happen and sees to it. A destroy comes
// first, then a resume that uses wait for.
func (b *box) turn() {
	if a := b.destroyAsked(); a != nil {
		b.destroy(a)
		return
	}
	if r := b.wakeAsked(); r != nil {
		b.answerWake(r)
		return
	}
	// Of a broken sandbox's VM nothing is expected any more but a destroy.
	var exit, full <-chan struct{}
	if b.rec.State == sandbox.Running || b.rec.State == sandbox.Paused {
		exit = b.vm.Done()
	}
	// One that somebody paused stays so, whatever becomes of the disk.
	if b.rec.State == sandbox.Running && !b.stuck {
		full = b.vm.DiskFull()
	}
	b.timer.Reset(b.untilNext())
	select {
	case <-b.kick:
	case <-exit:
		b.vmEnded()
	case <-full:
		b.diskFull()
	case r := <-b.inbox:
		b.answer(r)
	case i := <-b.shares.ended():
		b.shareEnded(i)
	case <-b.timer.C:
		b.onTimer()
	case <-b.m.closing.Done():
		b.leave()
	}
}

// answer decides on a request and does it.
func (b *box) answer(r *request) {
	r.err = b.decide(r)
	close(r.done)
}

func (b *box) decide(r *request) error {
	switch v, why := sandbox.Decide(b.rec.State, r.kind); v {
	case sandbox.Accept:
		err := r.do()
		// What a destroy cut off may not know by what.
		if asked := (cancelCause{}); err != nil && errors.As(context.Cause(b.life), &asked) {
			return asked
		}
		return err
	case sandbox.Already:
		return nil
	case sandbox.Deny:
		return denied(b.id, why)
	case sandbox.Wait: // the driver is never in its turn while the state is on its way
	}
	return fault.New(fault.Internal, "sandbox %s: %s can't be decided while %s", b.id, r.kind, b.rec.State)
}

// ask has the driver do something when the state accepts it. A caller that
// gives up does not end what has begun; wait says to see the end anyway,
// because it is near.
func (b *box) ask(ctx context.Context, kind sandbox.Request, wait bool, do func() error) error {
	for {
		p := b.pub.Load()
		if p.rec.State == sandbox.Gone {
			return notFound(string(b.id))
		}
		v, why := sandbox.Decide(p.rec.State, kind)
		switch v {
		case sandbox.Deny:
			return denied(b.id, why)
		case sandbox.Wait:
			if err := b.await(ctx, p); err != nil {
				return err
			}
			continue
		case sandbox.Accept, sandbox.Already:
		}
		r := &request{kind: kind, do: do, done: make(chan struct{})}
		select {
		case b.inbox <- r:
		case <-p.changed:
			continue
		case <-b.ended:
			return b.endErr()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if wait {
			<-r.done
			return r.err
		}
		select {
		case <-r.done:
			return r.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// await waits until p is not the latest any more.
func (b *box) await(ctx context.Context, p *published) error {
	select {
	case <-p.changed:
		return nil
	case <-b.ended:
		if b.pub.Load() != p {
			return nil
		}
		return b.endErr()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// endErr is why a sandbox whose driver has ended can't be asked.
func (b *box) endErr() error {
	if b.pub.Load().rec.State == sandbox.Gone {
		return notFound(string(b.id))
	}
	return stopping()
}

// change is a new state and why.
type change struct {
	to     sandbox.State
	cause  sandbox.Cause
	reason string
	// must says that the change must not happen without being written.
	must bool
}

// commit changes the state: written, then shown, then told. Unless the change
// must be written, a disk that takes no record does not stop it: it tells what
// already happened, and is written as soon as that works.
func (b *box) commit(c change) error {
	before := b.rec
	b.rec.State, b.rec.Cause, b.rec.Reason = c.to, c.cause, c.reason
	b.rec.ChangedAt = time.Now()
	b.stuck = b.stuck && c.to == sandbox.Paused
	if err := b.save(); err != nil {
		if c.must {
			b.rec = before
			return err
		}
		b.log.Warn("record can't be written, will try again", slog.Any("error", err))
	}
	b.show(before.State)
	return nil
}

// show publishes the record and tells of its state as an event.
func (b *box) show(previous sandbox.State) {
	b.publish()
	b.log.Info("sandbox changed", slog.String("state", string(b.rec.State)), slog.String("previous", string(previous)),
		slog.String("cause", string(b.rec.Cause)), slog.String("reason", b.rec.Reason))
	if b.rec.Spec.Purpose != "" { // nobody knows of it
		return
	}
	b.m.p.Events.Append(sandbox.Event{
		Time: b.rec.ChangedAt, ID: b.id, State: b.rec.State, Previous: previous,
		Cause: b.rec.Cause, Message: b.rec.Reason,
	})
}

// save writes the record.
func (b *box) save() error {
	b.rec.ActiveAt = b.lastActive()
	err := b.m.p.Records.Put(b.rec)
	b.savedAt, b.savedAct, b.unsaved = time.Now(), b.rec.ActiveAt, err != nil
	return err
}

// saveSoon writes the record, and has it tried again when that fails.
func (b *box) saveSoon() {
	if err := b.save(); err != nil {
		b.log.Warn("record can't be written, will try again", slog.Any("error", err))
	}
	b.publish()
}

// publish shows the record to readers.
func (b *box) publish() {
	b.rec.ActiveAt = b.lastActive()
	old := b.pub.Swap(&published{rec: b.rec, changed: make(chan struct{})})
	if old != nil {
		close(old.changed)
	}
}

// view is what readers see now.
func (b *box) view() View {
	v := View{Record: b.pub.Load().rec}
	b.mu.Lock()
	v.InFlight = b.inFlight
	v.ActiveAt = b.activeAt
	b.mu.Unlock()
	if v.Machine != nil {
		v.Pid = v.Machine.Process.PID
	}
	return v
}

// wake makes the driver look again.
func (b *box) wake() {
	select {
	case b.kick <- struct{}{}:
	default: // it will
	}
}

// op returns a context for a short operation on the VM: not a caller's, for it
// has to come to its end, but a destroy ends it.
func (b *box) op() (context.Context, context.CancelFunc) {
	return context.WithTimeout(b.life, opTimeout)
}

// at is where tests break a step.
func (b *box) at(ctx context.Context, step string) error { return b.m.at(ctx, b.id, step) }

func (m *Manager) at(ctx context.Context, id sandbox.ID, step string) error {
	if m.p.Break == nil {
		return nil
	}
	if err := m.p.Break(ctx, id, step); err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	return nil
}
