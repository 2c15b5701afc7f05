package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// What follows takes back one thing each. All are idempotent, and notice in
// the record what is not there any more.

// dropGuest ends the connection to the guest.
func (b *box) dropGuest(context.Context) error {
	b.clock.stop()
	b.clock = nil
	if b.guest == nil {
		return nil
	}
	// A connection that can't be closed in order is closed all the same.
	if err := b.guest.Close(); err != nil {
		b.log.Debug("guest connection did not close in order", "error", err)
	}
	b.guest = nil
	return nil
}

// killVM ends the VMM, taking up first one that an earlier hutchd started.
func (b *box) killVM(ctx context.Context) error {
	if b.vm == nil && b.rec.Machine != nil && b.rec.Machine.Process.BootID == b.m.bootID {
		vm, err := b.m.p.Driver.Adopt(ctx, *b.rec.Machine, b.vmSpec("", b.m.anyKernel(), ""))
		switch {
		case err == nil:
			b.vm = vm
		case !fault.Is(err, fault.NotFound):
			return fmt.Errorf("take up VM: %w", err)
		}
	}
	if b.vm != nil {
		if err := b.vm.Kill(ctx); err != nil {
			return fmt.Errorf("kill VM: %w", err)
		}
		if err := b.vm.Close(); err != nil {
			return fmt.Errorf("free VM: %w", err)
		}
	}
	b.vm, b.rec.Machine = nil, nil
	return nil
}

// freeSlot gives the network slot back. A slot that a live VMM is in is not
// touched.
func (b *box) freeSlot(ctx context.Context) error {
	switch {
	case b.rec.Slot == 0:
		return nil
	case b.rec.Machine != nil || b.vm != nil:
		return fmt.Errorf("free network slot %d: the VM is still in it", b.rec.Slot)
	}
	if err := b.m.p.Slots.Release(ctx, b.rec.Slot); err != nil {
		return fmt.Errorf("free network slot %d: %w", b.rec.Slot, err)
	}
	b.rec.Slot, b.rec.HostIP = 0, ""
	return nil
}

// dropRunDir removes the sockets, which a live VMM needs to be talked to.
func (b *box) dropRunDir(context.Context) error {
	if b.rec.Machine != nil || b.vm != nil {
		return errors.New("remove run directory: the VM is still alive")
	}
	if err := os.RemoveAll(b.runDir()); err != nil {
		return fmt.Errorf("remove run directory: %w", err)
	}
	return nil
}

// freeMachine takes back all that a sandbox without a VM does not need.
func (b *box) freeMachine(ctx context.Context) error {
	err := b.dropGuest(ctx)
	if err = errors.Join(err, b.killVM(ctx)); err != nil {
		return err
	}
	if err := b.dropRunDir(ctx); err != nil {
		return err
	}
	if b.rec.State != sandbox.Hibernated { // which keeps its address
		if err := b.freeSlot(ctx); err != nil {
			return err
		}
	}
	b.grant.release()
	b.grant = nil
	return nil
}
