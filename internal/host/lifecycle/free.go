package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

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

// DockerSocket is the name of the one file in a sandbox's run directory that is
// not its VMM's: it outlives VMs, and is there as long as the sandbox.
const DockerSocket = "docker.sock"

// dropSockets removes the sockets of a VM that has ended.
func (b *box) dropSockets(context.Context) error {
	if b.rec.Machine != nil || b.vm != nil { // it needs them to be talked to
		return errors.New("remove sockets: the VM is still alive")
	}
	if err := clearRunDir(b.runDir()); err != nil {
		return err
	}
	if err := os.Remove(b.runDir()); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return fmt.Errorf("remove run directory: %w", err)
	}
	return nil
}

// dropRunDir removes all that a sandbox has in the run directory.
func (b *box) dropRunDir(ctx context.Context) error {
	if err := b.dropSockets(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(b.runDir()); err != nil {
		return fmt.Errorf("remove run directory: %w", err)
	}
	return nil
}

// clearRunDir removes what VMs left in a run directory, if it is there.
func clearRunDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clear run directory: %w", err)
	}
	for _, e := range entries {
		if e.Name() == DockerSocket {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("clear run directory: %w", err)
		}
	}
	return nil
}

// freeMachine takes back all that a sandbox without a VM does not need.
func (b *box) freeMachine(ctx context.Context) error {
	err := b.dropGuest(ctx)
	if err = errors.Join(err, b.killVM(ctx)); err != nil {
		return err
	}
	if err := errors.Join(b.endShares(ctx), b.dropSockets(ctx)); err != nil {
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
