package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// Destroy implements Sandboxes. Callers that come while a destroy is at work
// wait for the same one.
func (m *Manager) Destroy(ctx context.Context, id sandbox.ID) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	a := b.askDestroy(sandbox.ByUser, "")
	if a == nil {
		return b.endErr()
	}
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// askDestroy cancels what the driver is at and makes it destroy the sandbox
// next. It returns nil when the driver has ended.
func (b *box) askDestroy(cause sandbox.Cause, reason string) *attempt {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return nil
	}
	if b.attempt == nil {
		b.attempt = &attempt{cause: cause, reason: reason, done: make(chan struct{})}
		b.doom(cancelCause{fault.New(fault.Precondition, "sandbox %s was destroyed meanwhile", b.id)})
		b.wake()
	}
	return b.attempt
}

func (b *box) destroyAsked() *attempt {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.attempt
}

// destroy is the driver's turn to end the sandbox. When something can't be
// freed the sandbox is broken, and whoever asked is told.
func (b *box) destroy(a *attempt) {
	err := b.end(a)
	if err == nil {
		b.vanish(a.cause, a.reason, true) // drive answers a
		return
	}
	a.err = fmt.Errorf("destroy sandbox %s: %w", b.id, err)
	b.breakDown(a.cause, a.err)
	b.mu.Lock()
	b.attempt = nil
	b.mu.Unlock()
	close(a.done)
}

// end frees all of a sandbox, tries everything and returns all that went
// wrong. What needs an earlier step to have worked is left for the next try,
// the record above all.
func (b *box) end(a *attempt) error {
	ctx := context.WithoutCancel(b.life)
	steps := []step{
		{"guest connection", b.dropGuest},
		{"VM", b.killVM},
		{"shares", b.endShares},
		{"network slot", b.freeSlot},
		{"run directory", b.dropRunDir},
	}
	err := b.at(ctx, "destroy record")
	if err == nil {
		err = b.commit(change{to: sandbox.Destroying, cause: a.cause, reason: a.reason})
	}
	if err != nil {
		// It only says what the next hutchd should do should this one die now.
		b.log.Warn("destroy goes on without its record", slog.Any("error", err))
	}
	var errs []error
	for _, s := range steps {
		err := b.at(ctx, "destroy "+s.name)
		if err == nil {
			err = b.within(s.do)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := b.at(ctx, "destroy files"); err != nil {
		return err
	}
	return b.m.p.Records.Remove(b.id)
}

// within gives one step of a destroy its own time.
func (b *box) within(do func(context.Context) error) error {
	ctx, cancel := undo.Detach(b.life)
	defer cancel()
	return do(ctx)
}

// vanish is the end of a sandbox of which nothing is left.
func (b *box) vanish(cause sandbox.Cause, reason string, told bool) {
	b.gone = true
	b.grant.release()
	b.m.forget(b)
	previous := b.rec.State
	b.rec.State, b.rec.Cause, b.rec.Reason = sandbox.Gone, cause, reason
	if told {
		b.show(previous)
	} else {
		b.publish()
	}
}

// breakDown is for a sandbox of which something can't be freed. The record
// tells what.
func (b *box) breakDown(cause sandbox.Cause, why error) {
	b.log.Error("sandbox is broken", slog.Any("error", why))
	// No error: the change need not be written.
	_ = b.commit(change{to: sandbox.Broken, cause: cause, reason: reasonOf(why)})
}

// vmEnded sees to a VMM that ended by itself: the state tells how at once, and
// what the VM needed is freed.
func (b *box) vmEnded() {
	b.halt(afterExit(b.vm.Exit()))
}

// afterExit is what becomes of a sandbox whose VMM ended.
func afterExit(exit vmm.Exit) change {
	c := change{to: sandbox.Failed, cause: sandbox.ByCrash, reason: exitReason(exit)}
	if exit.Reason == vmm.GuestPowerOff || exit.Reason == vmm.GuestReset {
		c.to, c.cause = sandbox.Stopped, sandbox.ByGuest
	}
	return c
}

// halt says that a sandbox has no VM any more and why, and frees what the VM
// needed.
func (b *box) halt(c change) {
	_ = b.commit(c) // no error: the change need not be written
	b.freeOrBreak(c.cause, c.reason)
	if c.to != sandbox.Hibernated {
		b.forgetSleep()
	}
}

// freeOrBreak frees what is left of a VM that has ended.
func (b *box) freeOrBreak(cause sandbox.Cause, reason string) {
	ctx, cancel := undo.Detach(b.life)
	defer cancel()
	err := b.at(ctx, "free")
	if err == nil {
		err = b.freeMachine(ctx)
	}
	if err != nil {
		b.breakDown(cause, fmt.Errorf("%s; then free its parts: %w", reason, err))
		return
	}
	b.saveSoon()
}
