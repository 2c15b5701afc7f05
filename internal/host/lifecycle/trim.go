package lifecycle

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// A guest gives blocks of its disk back when it is asked to. It is asked some
// time after it was used the last time, and now and then while it is used without
// a pause; not when its disk takes so little that nothing could be gained.
const (
	trimAfter   = time.Minute
	trimEvery   = 10 * time.Minute
	trimTimeout = time.Minute
	trimWorth   = 64 << 20 // bytes on the host
)

// Trimmed is what a trim gave back.
type Trimmed struct {
	Guest  uint64 // bytes that the guest gave back
	Host   uint64 // bytes that the data disk takes less on the host
	Detail string // by filesystem, in words of the guest
}

// Trim has the guest of a running sandbox give back the blocks that its
// filesystems do not use. It is no activity.
func (m *Manager) Trim(ctx context.Context, id sandbox.ID) (Trimmed, error) {
	g, err := m.look(ctx, id)
	if err != nil {
		return Trimmed{}, err
	}
	return m.trim(ctx, id, g)
}

func (m *Manager) trim(ctx context.Context, id sandbox.ID, g guestconn.Guest) (Trimmed, error) {
	path := m.p.Records.DataDisk(id)
	before, err := m.p.Disks.Allocated(path)
	if err != nil {
		return Trimmed{}, err
	}
	done, err := g.Trim(ctx)
	if err != nil {
		return Trimmed{}, fmt.Errorf("trim sandbox %s: %w", id, err)
	}
	after, err := m.p.Disks.Allocated(path)
	if err != nil {
		return Trimmed{}, err
	}
	return Trimmed{Guest: done.Bytes, Host: uint64(max(before-after, 0)), Detail: done.Detail}, nil
}

// trims is when a guest was asked for blocks, and whether it is to be asked
// again.
type trims struct {
	at    time.Time // of the last one
	never bool      // the guest can't
}

// due reports whether a guest is to be asked, which was active last at active.
func (t trims) due(now, active time.Time, busy bool) bool {
	switch {
	case t.never:
		return false
	case busy || now.Sub(active) < trimAfter:
		return now.Sub(t.at) >= trimEvery
	}
	return active.After(t.at)
}

// trimIfDue asks a guest for blocks when that is due.
func (b *box) trimIfDue(ctx context.Context, g guestconn.Guest, t *trims) {
	now, busy := time.Now(), b.view().InFlight > 0
	if !t.due(now, b.lastActive(), busy) {
		return
	}
	t.at = now
	if n, err := b.m.p.Disks.Allocated(b.m.p.Records.DataDisk(b.id)); err != nil || n < trimWorth {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, trimTimeout)
	defer cancel()
	done, err := b.m.trim(ctx, b.id, g)
	switch {
	case err == nil && done.Host > 0:
		b.log.Info("disk was trimmed", slog.Uint64("guest_bytes", done.Guest), slog.Uint64("host_bytes", done.Host))
	case fault.Is(err, fault.Unimplemented):
		t.never = true
	case err != nil && ctx.Err() == nil:
		b.log.Debug("disk was not trimmed", slog.Any("error", err))
	}
}
