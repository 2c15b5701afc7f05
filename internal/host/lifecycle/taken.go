package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// taken is what a sandbox was at one instant: its machine in RAM, its data disk
// in a draft that no reader looks at and that the next hutchd removes.
type taken struct {
	*capture
	id      string
	draft   *snapshot.Draft
	rec     sandbox.Record
	fit     snapshot.Fits
	stopped time.Duration // how long the sandbox stood still
}

// newTaken is what was captured of a sandbox; its disk is still to be copied.
func newTaken(b *box, c *capture) *taken {
	return &taken{capture: c, id: snapshot.NewID(), rec: b.rec, fit: c.fits(b)}
}

// take asks a sandbox for what it is now. It goes on.
func (m *Manager) take(ctx context.Context, b *box, op string) (t *taken, err error) {
	// Once begun it is waited for: it is short, and t is the caller's.
	err = b.ask(ctx, sandbox.Snapshot, true, func() error {
		var err error
		t, err = b.take(op)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s of sandbox %s: %w", op, b.id, err)
	}
	return t, nil
}

// take is the driver's turn.
func (b *box) take(op string) (*taken, error) {
	ctx, cancel := context.WithTimeoutCause(b.life, sleepTime, errSlow)
	defer cancel()
	ctx, stop := whileAlive(ctx, b.vm)
	defer stop()
	if err := b.at(ctx, op+" capture"); err != nil {
		return nil, err
	}
	began := time.Now()
	c, err := b.captureAny(ctx)
	if err != nil {
		return nil, err
	}
	t := newTaken(b, c)
	err = t.copyDisk(ctx, b, op)
	err = errors.Join(err, b.wakeUp())
	t.stopped = time.Since(began)
	if err != nil {
		return nil, errors.Join(err, t.drop())
	}
	b.log.Info("sandbox was copied", slog.String("for", op), slog.Duration("stood_still", t.stopped))
	return t, nil
}

// copyDisk copies the data disk while nobody writes to it.
func (t *taken) copyDisk(ctx context.Context, b *box, op string) error {
	if err := b.at(ctx, op+" disk"); err != nil {
		return err
	}
	draft, err := b.m.p.Snapshots.Begin(t.id)
	if err != nil {
		return err
	}
	t.draft = draft
	return b.m.p.Disks.Clone(ctx, b.m.p.Records.DataDisk(b.id), draft.Data())
}

// publish makes a snapshot of what was taken, of the kind and with what
// else only some kinds have. Of one that fails nothing is left.
func (t *taken) publish(ctx context.Context, m *Manager, as snapshot.Manifest) (*still, error) {
	as.ID, as.CreatedAt, as.Fits, as.DiskMB = t.id, time.Now(), t.fit, t.rec.Spec.DiskMB
	as.ImageDigest, as.Template = t.rec.ImageDigest, t.rec.Spec.Template
	snap, err := t.draft.Publish(ctx, as, t.state, t.memory)
	if err == nil {
		err = t.seal()
	}
	from := &origin{state: t.state, memory: t.memory}
	if err == nil {
		err = from.takeDisk(ctx, snap)
	}
	if err != nil {
		return nil, errors.Join(err, t.drop(), m.p.Snapshots.Remove(t.id))
	}
	return newStill(snap, from), nil
}

// seal makes what was taken something that nobody can change.
func (t *taken) seal() error { return errors.Join(snapshot.Seal(t.memory), snapshot.Seal(t.state)) }

// drop throws away what was taken, but what has become a snapshot.
func (t *taken) drop() error {
	t.close()
	if t.draft == nil {
		return nil
	}
	return t.draft.Drop()
}
