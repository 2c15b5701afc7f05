package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// Start takes up what the hutchd before left: it finishes or undoes what was
// half done, adopts every VM that is alive, and removes from the host what no
// record claims. Sandboxes in quarantine, and what they hold, are left alone.
// Only records that can't be listed are an error. After an error, or when ctx
// ended, the Manager must still be closed.
func (m *Manager) Start(ctx context.Context) error {
	m.mu.Lock()
	if m.phase != fresh {
		m.mu.Unlock()
		return errors.New("start sandboxes: started already")
	}
	m.phase = starting
	m.life, m.endLife = context.WithCancelCause(context.WithoutCancel(ctx))
	m.closing, m.close = context.WithCancelCause(m.life)
	m.mu.Unlock()

	loaded, err := m.p.Records.Load()
	if err != nil {
		return fmt.Errorf("start sandboxes: %w", err)
	}
	m.quarantine(loaded.Quarantined)
	m.tellTrashed(loaded)
	m.reclaimJails(ctx, loaded)
	if err := m.recoverAll(ctx, loaded.Records); err != nil {
		return fmt.Errorf("start sandboxes: %w", err)
	}
	m.reclaimRunDirs()
	m.reclaimSlots(ctx)
	stale := m.stock.open()

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase == starting {
		m.phase = open
		m.wg.Go(func() { m.warm.again(stale) })
	}
	return nil
}

func (m *Manager) quarantine(all []store.Quarantined) {
	for _, q := range all {
		m.p.Log.Error("sandbox is in quarantine, its record can't be read",
			slog.String("sandbox_id", q.Name), slog.String("dir", q.Dir), slog.Any("error", q.Err))
		m.mu.Lock()
		m.quarantined[sandbox.ID(q.Name)] = q
		m.mu.Unlock()
	}
}

// tellTrashed tells of sandboxes that were removed, in case the hutchd before
// was killed before it could.
func (m *Manager) tellTrashed(l store.Loaded) {
	there := map[sandbox.ID]bool{}
	for _, r := range l.Records {
		there[r.ID] = true
	}
	for _, id := range l.Trashed {
		if there[id] {
			continue
		}
		there[id] = true
		m.p.Events.Append(sandbox.Event{
			ID: id, State: sandbox.Gone, Previous: sandbox.Destroying,
			Cause: sandbox.ByHost, Message: "removed before hutchd was started again",
		})
	}
}

// reclaimJails ends processes that no record claims. A record without a
// machine claims none: a VM that was launched but not yet written down ends
// here.
func (m *Manager) reclaimJails(ctx context.Context, l store.Loaded) {
	if m.p.ReclaimJails == nil {
		return
	}
	claimed := map[sandbox.ID]bool{}
	for _, r := range l.Records {
		claimed[r.ID] = r.Machine != nil && r.Machine.Process.BootID == m.bootID
	}
	for _, q := range l.Quarantined {
		claimed[sandbox.ID(q.Name)] = true
	}
	if err := m.p.ReclaimJails(ctx, func(id sandbox.ID) bool { return claimed[id] }); err != nil {
		m.p.Log.Error("processes of sandboxes that are gone can't all be ended", slog.Any("error", err))
	}
}

// recoverAll starts the drivers of all sandboxes and waits until each knows
// what its sandbox is.
func (m *Manager) recoverAll(ctx context.Context, records []sandbox.Record) error {
	var boxes []*box
	m.mu.Lock()
	if m.phase != starting {
		m.mu.Unlock()
		return stopping()
	}
	for _, r := range records {
		r.Spec = r.Spec.WithDefaults() // what is younger than the record
		b := m.newBox(r)
		b.savedAt, b.savedAct = time.Now(), r.ActiveAt
		m.boxes[r.ID] = b
		boxes = append(boxes, b)
		m.wg.Go(func() {
			b.drive(func() {
				m.work <- struct{}{}
				defer func() { <-m.work }()
				b.recover()
			})
		})
	}
	m.mu.Unlock()
	for _, b := range boxes {
		select {
		case <-b.made:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// recover is the driver's first work for a sandbox that was there before.
func (b *box) recover() {
	b.log.Debug("taking up sandbox", slog.String("state", string(b.rec.State)))
	if b.rec.Spec.Purpose != "" { // whoever wanted it is gone
		if a := b.askDestroy(sandbox.ByHost, "hutchd ended while it was needed"); a != nil {
			b.destroy(a)
		}
		return
	}
	switch b.rec.State {
	case sandbox.Pending:
		b.recoverPending()
	case sandbox.Running, sandbox.Paused:
		b.adopt()
	case sandbox.Destroying:
		if a := b.askDestroy(b.rec.Cause, b.rec.Reason); a != nil {
			b.destroy(a)
		}
	case sandbox.Hibernated:
		b.recoverAsleep()
	case sandbox.Stopped, sandbox.Failed:
		b.retell(b.rec.Cause, b.rec.Reason)
		if b.rec.Machine != nil || b.rec.Slot != 0 {
			b.freeOrBreak(b.rec.Cause, b.rec.Reason)
		}
	case sandbox.Broken:
		b.retell(b.rec.Cause, b.rec.Reason)
		b.grant = b.m.admission.take(b.rec.Spec.MemoryMB)
		b.holdSlot()
	case sandbox.Gone:
	}
}

// recoverAsleep takes up a hibernated sandbox. A VMM that is left of it has
// nothing to do any more; its slot is gone after a restart of the host.
//
// A memory that is there was never used, so its VMM has not run since. Where
// there is none, the hibernation was given up and the record of that not
// written: the VMM runs, or has died.
func (b *box) recoverAsleep() {
	if !b.m.p.Memories.Asleep(b.id) {
		b.adopt()
		return
	}
	b.retell(b.rec.Cause, b.rec.Reason)
	if b.rec.Machine != nil {
		b.freeOrBreak(b.rec.Cause, b.rec.Reason)
	}
	if b.rec.Slot == 0 {
		return
	}
	ctx, cancel := undo.Detach(b.life)
	defer cancel()
	slot, err := b.m.p.Slots.Adopt(ctx, b.rec.Slot, b.rec.Spec.Network)
	if err == nil {
		b.slot = slot
		return
	}
	b.log.Warn("network slot of a hibernated sandbox is gone, it will get another", slog.Any("error", err))
	b.rec.Slot, b.rec.HostIP = 0, ""
	b.saveSoon()
}

// recoverPending undoes a create that was cut off; a sandbox that booted again
// has a disk to keep, and is in error.
func (b *box) recoverPending() {
	if b.rec.Boots > 0 && b.m.p.Memories.Asleep(b.id) { // its processors never ran
		b.rec.State = sandbox.Hibernated // what is freed goes by it
		b.halt(change{to: sandbox.Hibernated, cause: sandbox.ByHost, reason: "hutchd ended while the sandbox was being restored; resume it"})
		b.recoverAsleep()
		return
	}
	if b.rec.Boots > 0 && b.rec.Machine != nil && b.m.p.Memories.Woken(b.id) { // it woke, and nobody was there
		b.adopt()
		return
	}
	if b.rec.Boots > 0 {
		b.halt(change{to: sandbox.Failed, cause: sandbox.ByHost, reason: "hutchd ended while the sandbox booted again; resume it"})
		return
	}
	if a := b.askDestroy(sandbox.ByHost, "hutchd ended while the sandbox was being made"); a != nil {
		b.destroy(a)
	}
}

// adopt takes up a sandbox whose VM should be alive.
func (b *box) adopt() {
	ctx, cancel := b.op()
	defer cancel()
	lost := change{to: sandbox.Failed, cause: sandbox.ByHost}
	machine := b.rec.Machine
	if machine == nil || machine.Process.BootID != b.m.bootID {
		lost.reason = "the host was restarted"
		b.halt(lost)
		return
	}
	image, err := b.m.p.Templates.Image(b.rec.ImageDigest)
	if err != nil { // the VM has it open
		b.log.Warn("image of a live sandbox is not there any more", slog.Any("error", err))
	}
	vm, err := b.m.p.Driver.Adopt(ctx, *machine, b.vmSpec(image, b.m.anyKernel(), ""))
	switch {
	case fault.Is(err, fault.NotFound):
		b.halt(endedAway(err))
		return
	case err != nil:
		b.grant = b.m.admission.take(b.rec.Spec.MemoryMB)
		b.holdSlot()
		b.breakDown(sandbox.ByHost, fmt.Errorf("its VM is alive and can't be taken up: %w", err))
		return
	}
	b.vm = vm
	b.adoptShares(ctx)
	if b.slot, err = b.m.p.Slots.Adopt(ctx, b.rec.Slot, b.rec.Spec.Network); err != nil {
		// Nobody knows what it could reach: better no VM than one let loose.
		lost.reason = fmt.Sprintf("its network slot can't be taken up: %v", err)
		b.halt(lost)
		return
	}
	b.carryOn(ctx)
}

// endedAway is what becomes of a sandbox whose VMM ended while nobody watched,
// by the error of its adoption.
func endedAway(err error) change {
	const when = "its VMM ended while hutchd was not running"
	var gone *vmm.Gone
	if !errors.As(err, &gone) {
		return change{to: sandbox.Failed, cause: sandbox.ByCrash, reason: when}
	}
	c := afterExit(gone.Exit)
	c.reason = when + ": " + c.reason
	return c
}

// carryOn goes on with an adopted VM, in the state that it is in. The guest
// agent is not waited for: its connection comes back by itself, and uses wait
// for it.
func (b *box) carryOn(ctx context.Context) {
	state := b.rec.State
	switch running, err := b.vm.Running(ctx); {
	case err != nil:
		b.log.Warn("VM does not tell whether it runs", slog.Any("error", err))
	case running:
		state = sandbox.Running
	case state != sandbox.Paused: // held by a hutchd that was killed meanwhile
		if err := b.vm.Resume(ctx); err != nil {
			b.log.Warn("VM that was being copied does not go on", slog.Any("error", err))
			state = sandbox.Paused
			break
		}
		state = sandbox.Running
	}
	m := b.vm.Machine()
	b.rec.Machine = &m
	b.guest = b.m.p.Connect(b.vm, b.log)
	b.grant = b.m.admission.take(b.rec.Spec.MemoryMB)
	b.active()
	const why = "adopted after a restart of hutchd"
	if state != b.rec.State {
		_ = b.commit(change{to: state, cause: sandbox.ByHost, reason: why}) // no error: need not be written
	} else {
		b.saveSoon()
		b.retell(sandbox.ByHost, why)
	}
	b.forgetSleep()
	b.startClock(0)
	b.watchReady()
	b.adoptFull()
}

// retell tells of a state that did not change: the hutchd before may have been
// killed between writing the state down and telling of it.
func (b *box) retell(cause sandbox.Cause, message string) {
	b.m.p.Events.Append(sandbox.Event{
		Time: time.Now(), ID: b.id, State: b.rec.State, Previous: b.rec.State, Cause: cause, Message: message,
	})
}

// watchReady lets an adopted guest go on that may be held, and logs when its
// agent does not come back.
func (b *box) watchReady() {
	guest, vm, config := b.guest, b.vm, b.guestConfig()
	if b.rec.State != sandbox.Running {
		return
	}
	b.m.wg.Go(func() {
		ctx, cancel := context.WithTimeout(b.life, b.m.p.ReadyTimeout)
		defer cancel()
		stop := context.AfterFunc(b.m.closing, cancel)
		defer stop()
		ctx, end := whileAlive(ctx, vm)
		defer end()
		_, err := guest.Configure(ctx, config)
		if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			b.log.Warn("guest agent has not come back since the sandbox was adopted", slog.Any("error", err))
		}
	})
}

// holdSlot keeps the slot of a broken sandbox from being given away.
func (b *box) holdSlot() {
	if b.rec.Slot == 0 {
		return
	}
	ctx, cancel := undo.Detach(b.life)
	defer cancel()
	if _, err := b.m.p.Slots.Adopt(ctx, b.rec.Slot, b.rec.Spec.Network); err != nil {
		b.log.Warn("network slot of a broken sandbox can't be held", slog.Any("error", err))
	}
}

// reclaimSlots frees every network slot that no sandbox has.
func (m *Manager) reclaimSlots(ctx context.Context) {
	var live []int
	m.mu.Lock()
	for _, b := range m.boxes {
		if slot := b.pub.Load().rec.Slot; slot != 0 {
			live = append(live, slot)
		}
	}
	m.mu.Unlock()
	unknown := false
	for _, q := range m.Quarantined() {
		switch {
		case q.Claims == nil:
			m.p.Log.Warn("network slots are not reclaimed: any may belong to a sandbox in quarantine", slog.String("sandbox_id", q.Name))
			unknown = true
		case q.Claims.Slot != 0:
			live = append(live, q.Claims.Slot)
			if _, err := m.p.Slots.Adopt(ctx, q.Claims.Slot, q.Claims.Spec.Network); err != nil {
				m.p.Log.Warn("network slot of a sandbox in quarantine can't be held", slog.String("sandbox_id", q.Name), slog.Any("error", err))
			}
		}
	}
	if unknown {
		return
	}
	if err := m.p.Slots.Reclaim(ctx, live); err != nil {
		m.p.Log.Error("network slots that nothing claims can't all be removed", slog.Any("error", err))
	}
}

// reclaimRunDirs removes the run directories of sandboxes that are gone.
func (m *Manager) reclaimRunDirs() {
	entries, err := os.ReadDir(m.sandboxRunDir())
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			m.p.Log.Warn("run directories can't be listed", slog.Any("error", err))
		}
		return
	}
	for _, e := range entries {
		id := sandbox.ID(e.Name())
		m.mu.Lock()
		b, q := m.boxes[id], m.quarantined[id]
		m.mu.Unlock()
		if q.Name != "" || b != nil && b.pub.Load().rec.State.HasVM() {
			continue
		}
		if err := os.RemoveAll(filepath.Join(m.sandboxRunDir(), e.Name())); err != nil {
			m.p.Log.Warn("run directory can't be removed", slog.Any("error", err))
		}
	}
}
