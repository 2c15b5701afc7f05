package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// sleepTime bounds the writing and the reading of a memory.
const sleepTime = 10 * time.Minute

// Hibernate implements Sandboxes: a sandbox's memory goes to disk, and its VM
// away. It keeps its id, its disk, its network slot and its place in the list.
func (m *Manager) Hibernate(ctx context.Context, id sandbox.ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	if err := b.unbound("hibernated"); err != nil {
		return err
	}
	return b.ask(ctx, sandbox.Hibernate, false, func() error { return b.hibernate(sandbox.ByUser, "") })
}

// hibernate ends with the sandbox asleep, or going on as before.
func (b *box) hibernate(cause sandbox.Cause, reason string) error {
	ctx, cancel := context.WithTimeoutCause(b.life, sleepTime, errSlow)
	defer cancel()
	ctx, stop := whileAlive(ctx, b.vm)
	defer stop()
	ctx, awake := b.interruptible(ctx, cause == sandbox.ByTTL)
	defer awake()
	if err := b.fallAsleep(ctx); err != nil {
		return fmt.Errorf("hibernate sandbox %s: %w", b.id, err)
	}
	err := b.at(ctx, "hibernate record")
	if err == nil {
		err = b.commit(change{to: sandbox.Hibernated, cause: cause, reason: reason, must: true})
	}
	if err != nil {
		// The memory first: should the record say hibernated all the same, a
		// later hutchd must not find it beside a disk that has gone on.
		gone := b.m.p.Memories.DropMemory(b.id)
		return errors.Join(fmt.Errorf("hibernate sandbox %s: %w", b.id, err), gone, b.wakeUp())
	}
	b.freeOrBreak(cause, "hibernated")
	return nil
}

// fallAsleep writes the memory down. On error the sandbox goes on.
func (b *box) fallAsleep(ctx context.Context) (err error) {
	if err := b.at(ctx, "hibernate capture"); err != nil {
		return err
	}
	c, err := b.captureAny(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	defer func() {
		if err != nil {
			err = errors.Join(err, b.wakeUp())
		}
	}()
	if err := b.at(ctx, "hibernate write"); err != nil {
		return err
	}
	draft, err := snapshot.Begin(b.m.p.Memories.Hibernation(b.id))
	if err != nil {
		return err
	}
	_, err = draft.Publish(ctx, snapshot.Manifest{
		ID: snapshot.NewID(), Kind: snapshot.Hibernation, CreatedAt: time.Now(), Fits: c.fits(b), DiskMB: b.rec.Spec.DiskMB,
		ImageDigest: b.rec.ImageDigest, Template: b.rec.Spec.Template, Source: b.id, Parent: b.rec.Snapshot,
	}, c.state, c.memory)
	return err
}

// interruptible returns a context that a resume ends, and with light a use that
// is on its way as well. Either counts as activity. done must be called.
func (b *box) interruptible(ctx context.Context, light bool) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	b.mu.Lock()
	b.light, b.rouse = light, func() {
		b.activeAt = time.Now()
		cancel(fault.New(fault.Canceled, "a resume or a use came first"))
	}
	if light && b.wanted > 0 {
		b.rouse()
	}
	b.mu.Unlock()
	return ctx, func() {
		b.mu.Lock()
		b.light, b.rouse = false, nil
		b.mu.Unlock()
		cancel(nil)
	}
}

// interrupt ends a hibernation that is on its way.
func (b *box) interrupt() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rouse != nil {
		b.rouse()
	}
}

// restoreSteps bring a hibernated sandbox back. Until "restore" lets its
// processors run, it stays hibernated when one fails.
func (o *boot) restoreSteps() []step {
	return []step{
		{"queue", o.waitForTurn},
		{"memory", o.readMemory},
		{"slot", o.keepSlot},
		{"record", o.writePending},
		{"restore", o.launch},
		{"hello", o.waitForHello},
		{"configure", o.configure},
		{"running", o.becomeRunning},
	}
}

// restore brings a hibernated sandbox back. When that fails before its
// processors ran, it is hibernated as before; after that it has only its disk.
func (b *box) restore(why string) error {
	image, err := b.m.p.Templates.Image(b.rec.ImageDigest)
	if err != nil {
		return fmt.Errorf("resume sandbox %s: find its image: %w", b.id, err)
	}
	pack, err := b.m.kernelOf(b.rec.KernelID)
	if err != nil {
		return fmt.Errorf("resume sandbox %s: %w", b.id, err)
	}
	grant, turn, err := b.m.admission.admit(b.rec.Spec.MemoryMB, false)
	if err != nil {
		return err
	}
	b.grant = grant
	o := &boot{box: b, op: "resume", why: why, image: image, kernel: pack, turn: turn}
	failed, left := o.run(o.restoreSteps())
	turn.end()
	if o.from != nil {
		o.from.close()
	}
	if failed == nil {
		b.forgetSleep()
		return nil
	}
	switch {
	case left != nil:
		err := fmt.Errorf("%w (and not all could be taken back, destroy it: %w)", failed, left)
		b.breakDown(b.causeOf(failed), err)
		return err
	case !o.spent:
		b.grant.release()
		b.grant = nil
		if b.rec.State == sandbox.Pending {
			err = b.commit(change{to: sandbox.Hibernated, cause: b.causeOf(failed), reason: reasonOf(failed)})
		}
		return errors.Join(failed, err)
	}
	b.halt(change{to: sandbox.Failed, cause: b.causeOf(failed), reason: reasonOf(failed)})
	return failed
}

// kernelOf returns the pack with an id, which a machine once booted.
func (m *Manager) kernelOf(id string) (kernel.Pack, error) {
	find := m.p.Kernel
	if m.p.OldKernel != nil {
		find = func() (kernel.Pack, error) { return m.p.OldKernel(id) }
	}
	pack, err := find()
	if err != nil {
		return kernel.Pack{}, fmt.Errorf("find the kernel that the machine booted: %w", err)
	}
	return pack, nil
}

// readMemory reads the memory into RAM. It is this VM's own.
func (o *boot) readMemory(ctx context.Context) error {
	snap, err := snapshot.Open(o.m.p.Memories.Hibernation(o.id))
	if err != nil {
		return err
	}
	if err := snap.Fits.Check(o.m.fits(o.kernel.ID, o.rec.Spec.VCPUs, o.rec.Spec.MemoryMB)); err != nil {
		return err
	}
	memory, err := snap.LoadMemory(ctx)
	if err != nil {
		return err
	}
	state, err := snap.CopyState(ctx)
	if err != nil {
		return errors.Join(err, memory.Close())
	}
	o.from = &origin{state: state, memory: memory, own: true}
	return nil
}

// keepSlot uses the slot that the sandbox kept. One that lost it, since the host
// was restarted, gets another, with another address.
func (o *boot) keepSlot(ctx context.Context) error {
	if o.rec.Slot != 0 {
		return nil
	}
	return o.takeSlot(ctx)
}

// spend sees to it that a memory is not used twice.
func (o *boot) spend() error {
	if !o.from.own {
		return nil
	}
	if err := o.m.p.Memories.Spend(o.id); err != nil {
		return err
	}
	o.spent = true
	return nil
}

// forgetSleep removes what a hibernation left on disk.
func (b *box) forgetSleep() {
	if err := b.m.p.Memories.DropMemory(b.id); err != nil {
		b.log.Warn("memory that was used can't be removed", slog.Any("error", err))
	}
}
