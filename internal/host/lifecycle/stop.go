package lifecycle

import (
	"context"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// killMargin is what a guest gets beyond its grace to have its VMM end.
const killMargin = 5 * time.Second

// leave is the driver's last turn when hutchd stops.
func (b *box) leave() {
	b.leaving = true
	if b.rec.Spec.Purpose != "" { // of no use to the next hutchd
		if a := b.askDestroy(sandbox.ByHost, "hutchd stopped"); a != nil {
			b.destroy(a)
		}
		return
	}
	b.m.mu.Lock()
	keep := b.m.keepVMs
	b.m.mu.Unlock()
	if alive := b.rec.State == sandbox.Running || b.rec.State == sandbox.Paused; alive && !keep {
		b.m.work <- struct{}{}
		b.shutDown()
		<-b.m.work
		if b.life.Err() == nil {
			b.halt(change{to: sandbox.Stopped, cause: sandbox.ByHost, reason: "hutchd stopped its sandboxes"})
			return
		}
	}
	_ = b.dropGuest(b.life) // never an error
	b.shares.letGo(b.log)
	if b.vm != nil {
		if err := b.vm.Close(); err != nil {
			b.log.Warn("VM could not be let go of", slog.Any("error", err))
		}
		b.vm = nil
	}
	if b.unsaved || !b.lastActive().Equal(b.savedAct) {
		b.saveSoon()
	}
}

// shutDown asks the guest to power off, and returns when its VMM has ended or
// its time is over. A guest that is paused runs for that.
func (b *box) shutDown() {
	ctx, cancel := context.WithTimeout(b.life, b.m.p.StopGrace+killMargin)
	defer cancel()
	if b.rec.State == sandbox.Paused {
		if err := b.vm.Resume(ctx); err != nil {
			b.log.Warn("paused guest can't be shut down", slog.Any("error", err))
			return
		}
	}
	ctx, stop := whileAlive(ctx, b.vm) // from its resume on: one that stood for want of room may go on
	defer stop()
	if err := b.guest.Shutdown(ctx, b.m.p.StopGrace); err != nil {
		b.log.Warn("guest does not shut down", slog.Any("error", err))
		return
	}
	<-ctx.Done()
}
