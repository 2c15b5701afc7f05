package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// origin is a machine that stood still, in RAM: others are started from it.
type origin struct {
	state  *os.File // sealed
	memory *os.File // sealed, unless own
	// own says that the memory is for one VM, which changes it.
	own bool
	// data makes path a copy of the data disk. Nil: the disk is there.
	data func(ctx context.Context, path string) error
	// disk is what data copies, sealed. Nil: it is not in RAM.
	disk *os.File

	mu    sync.Mutex
	users int
	over  bool
}

// use keeps the origin until the returned release, which may be called more
// than once. ok is false when it is closed.
func (o *origin) use() (release func(), ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.over {
		return nil, false
	}
	o.users++
	return sync.OnceFunc(func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.users--
		o.closeIdle()
	}), true
}

// close frees the origin when its last user has gone.
func (o *origin) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.over = true
	o.closeIdle()
}

// closeIdle is called with the lock held.
func (o *origin) closeIdle() {
	if o.over && o.users == 0 {
		_, _ = o.state.Close(), o.memory.Close() // memory without a name: nothing is lost
		if o.disk != nil {
			_ = o.disk.Close()
		}
	}
}

// takeDisk has the data disk of snap be what copies get: from RAM, where every
// byte was compared once and nothing can change it, unless it is large.
func (o *origin) takeDisk(ctx context.Context, snap *snapshot.Snapshot) error {
	o.data = snap.CopyData
	if !diskInRAM(snap) {
		return nil
	}
	disk, err := snap.LoadData(ctx)
	if err != nil {
		return err
	}
	if err := snapshot.Seal(disk); err != nil {
		return errors.Join(err, disk.Close())
	}
	o.disk = disk
	o.data = func(ctx context.Context, path string) error { return snapshot.CopyMemory(ctx, disk, path) }
	return nil
}

// maxDiskInRAM is up to where a data disk is kept in RAM, in bytes that are
// not zero.
const maxDiskInRAM = 256 << 20

func diskInRAM(s *snapshot.Snapshot) bool { return s.Data != nil && s.Data.Stored <= maxDiskInRAM }

// bytesInRAM is what a snapshot takes in RAM when it is there.
func bytesInRAM(s *snapshot.Snapshot) int64 {
	if diskInRAM(s) {
		return s.Memory.Stored + s.Data.Stored
	}
	return s.Memory.Stored
}

// saved is what a driver starts a VM from.
func (o *origin) saved() vmm.Saved {
	return vmm.Saved{State: o.state, Memory: o.memory, Shared: o.own}
}

// capture is what a VM was when it stood still.
type capture struct {
	state, memory *os.File
	stats         vmm.Stats
}

func (c *capture) close() { _, _ = c.state.Close(), c.memory.Close() }

// capture holds the guest still, has it rest, stops its VM and writes both
// down. The VM stays stopped, and the guest held, until goOn. On error they go
// on.
func (b *box) capture(ctx context.Context, rest time.Duration) (_ *capture, err error) {
	saver, ok := b.vm.(vmm.Saver)
	if !ok {
		return nil, fault.New(fault.Unimplemented, "%s can't write a VM down", b.m.p.Driver.Caps().Name)
	}
	if _, err := b.guest.Quiesce(ctx); err != nil {
		return nil, fmt.Errorf("hold guest still: %w", err)
	}
	defer func() {
		if err != nil {
			b.disturb(rest)
			err = errors.Join(err, b.goOn())
		}
	}()
	if err := b.settle(ctx, rest); err != nil {
		return nil, fmt.Errorf("have guest rest: %w", err)
	}
	if err := b.vm.Pause(ctx); err != nil {
		return nil, fmt.Errorf("stop VM: %w", err)
	}
	c := &capture{}
	if c.state, err = snapshot.NewMemory("hutch-state", 0); err != nil {
		return nil, err
	}
	if c.memory, err = snapshot.NewMemory("hutch-memory", 0); err != nil {
		_ = c.state.Close()
		return nil, err
	}
	if c.stats, err = saver.Save(ctx, vmm.Files{State: c.state, Memory: c.memory}); err != nil {
		c.close()
		return nil, fmt.Errorf("write VM down: %w", err)
	}
	return c, nil
}

// captureAny is capture for a sandbox that runs or is paused; wakeUp ends it.
func (b *box) captureAny(ctx context.Context) (*capture, error) {
	paused := b.rec.State == sandbox.Paused
	if paused { // to be held, a guest must run
		if err := b.vm.Resume(ctx); err != nil {
			return nil, b.unsure(err)
		}
	}
	c, err := b.capture(ctx, 0)
	if err != nil {
		return nil, errors.Join(err, b.standStill(paused))
	}
	return c, nil
}

// wakeUp lets a captured guest go on, in the state that the sandbox is in.
func (b *box) wakeUp() error {
	if err := b.goOn(); err != nil {
		return b.unsure(err)
	}
	return b.standStill(b.rec.State == sandbox.Paused)
}

// standStill stops a VM again that was paused before.
func (b *box) standStill(paused bool) error {
	if !paused {
		return nil
	}
	ctx, cancel := undo.Detach(b.life)
	defer cancel()
	if err := b.vm.Pause(ctx); err != nil {
		return b.unsure(err)
	}
	return nil
}

// settle leaves the guest alone for a while, 0: not at all, and its connection
// closed. What it does then, none of its copies has to do: notice that its host
// has gone, see its links and disks become idle. It can't tell when it is
// through with that.
func (b *box) settle(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	b.clock.stop()
	b.clock = nil
	if err := b.guest.Close(); err != nil {
		b.log.Debug("guest connection did not close in order", slog.Any("error", err))
	}
	return delay.For(ctx, d)
}

// disturb ends a rest of d.
func (b *box) disturb(d time.Duration) {
	if d != 0 {
		b.guest = b.m.p.Connect(b.vm, b.log)
	}
}

// goOn lets a guest that a capture held go on, in a VM that may stand. It is
// how a capture is taken back, and so has time of its own.
func (b *box) goOn() error {
	ctx, cancel := undo.Detach(b.life)
	defer cancel()
	if err := b.vm.Resume(ctx); err != nil {
		return fmt.Errorf("start VM again: %w", err)
	}
	if _, err := b.guest.Configure(ctx, b.guestConfig()); err != nil {
		return fmt.Errorf("let guest go on: %w", err)
	}
	return nil
}

// fits describes the machine that was captured.
func (c *capture) fits(b *box) snapshot.Fits {
	f := b.m.fits(b.rec.KernelID, b.rec.Spec.VCPUs, b.rec.Spec.MemoryMB)
	f.VMMVersion, f.Machine, f.Accel, f.CPU = c.stats.Version, c.stats.Machine, c.stats.Accel, c.stats.CPU
	return f
}

// fits describes the machine that a sandbox gets on this host.
func (m *Manager) fits(kernelID string, vcpus, memoryMB int) snapshot.Fits {
	c := m.p.Driver.Caps()
	return snapshot.Fits{
		VMM: c.Name, VMMVersion: c.Version, Machine: c.Machine, Accel: c.Accel, CPU: c.CPU,
		KernelID: kernelID, VCPUs: vcpus, MemoryMB: memoryMB,
	}
}
