package lifecycle

import (
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// A guest that was stopped because the host's disk is full goes on when it has
// roomMB again, for which is looked every roomEvery.
const (
	roomEvery = 5 * time.Second
	roomMB    = 64
)

// diskFull is for a guest that its VMM stopped rather than lose what it writes:
// it counts as paused until the host's disk has room, or somebody resumes it.
func (b *box) diskFull() {
	// The VMM may only be about to stop it.
	err := b.pause(sandbox.ByHost, "the host's disk is full: the guest stands, and goes on when there is room")
	if err != nil {
		b.log.Warn("guest that stands for want of room on the host's disk can't be paused", slog.Any("error", err))
	}
	b.stuck, b.lookedAt = true, time.Now()
}

// adoptFull takes up a guest that the hutchd before paused by diskFull.
func (b *box) adoptFull() {
	if b.rec.State != sandbox.Paused || b.rec.Cause != sandbox.ByHost {
		return
	}
	select {
	case <-b.vm.DiskFull():
		b.diskFull()
	default:
	}
}

// lookForRoom has the guest go on when the host's disk has room again.
func (b *box) lookForRoom() {
	b.lookedAt = time.Now()
	free, err := b.m.admission.capacity()
	if err != nil {
		b.log.Warn("no room is found for a guest that stands, will look again", slog.Any("error", err))
		return
	}
	if free.DiskMB < roomMB {
		return
	}
	if err := b.unpause(sandbox.ByHost, "the host's disk has room again"); err != nil {
		b.log.Warn("guest that stood for want of room does not go on, will try again", slog.Any("error", err))
	}
}
