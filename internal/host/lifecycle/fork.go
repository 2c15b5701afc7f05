package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// maxForks bounds the copies that one call makes. All of them must have a place
// in the queue of starts, which has 64 unless told otherwise.
const maxForks = 64

// Fork makes count copies of a sandbox that runs or is paused, or none. They
// run, each with an identity of its own. The source stands still once, for its
// memory and its disk to be copied; the copies are started from that while it
// goes on.
func (m *Manager) Fork(ctx context.Context, id sandbox.ID, count int) (_ Forked, err error) {
	if count < 1 || count > maxForks {
		return Forked{}, fault.BadField("count", "must be between 1 and %d", maxForks)
	}
	if !m.stock.on() {
		return Forked{}, fault.New(fault.Unimplemented, "this host can't fork sandboxes")
	}
	b, err := m.find(id)
	if err != nil {
		return Forked{}, err
	}
	if err := b.unbound("forked"); err != nil {
		return Forked{}, err
	}
	rooms, err := m.admitAll(b.pub.Load().rec.Spec.MemoryMB, count)
	if err != nil {
		return Forked{}, err
	}
	defer func() { giveBack(rooms) }()
	t, err := m.take(ctx, b, "fork")
	if err != nil {
		return Forked{}, err
	}
	from := &origin{state: t.state, memory: t.memory, data: t.cloneDisk(m)}
	defer func() {
		from.close()
		if left := t.draft.Drop(); left != nil {
			m.p.Log.Warn("disk of forks can't be removed", slog.Any("error", left))
		}
	}()
	if err := t.seal(); err != nil {
		return Forked{}, err
	}
	boxes, err := m.launchForks(t, from, &rooms)
	views := make([]View, 0, count)
	for _, b := range boxes {
		err = errors.Join(err, b.waitMade(ctx))
		views = append(views, b.view())
	}
	if err == nil {
		return Forked{Views: views, Stopped: t.stopped}, nil
	}
	return Forked{}, errors.Join(fmt.Errorf("fork sandbox %s: %w", id, err), m.takeBack(boxes))
}

// room is what was admitted for one sandbox.
type room struct {
	grant *grant
	turn  *turn
}

// admitAll takes room for count sandboxes, or for none.
func (m *Manager) admitAll(memoryMB, count int) ([]room, error) {
	var rooms []room
	for range count {
		g, t, err := m.admission.admit(memoryMB, true)
		if err != nil {
			giveBack(rooms)
			return nil, fmt.Errorf("room for copy %d of %d: %w", len(rooms)+1, count, err)
		}
		rooms = append(rooms, room{g, t})
	}
	return rooms, nil
}

func giveBack(rooms []room) {
	for _, r := range rooms {
		r.turn.end()
		r.grant.release()
	}
}

// launchForks starts a copy in each of the rooms, which are theirs then.
func (m *Manager) launchForks(t *taken, from *origin, rooms *[]room) ([]*box, error) {
	image, err := m.p.Templates.Image(t.rec.ImageDigest)
	if err != nil {
		return nil, fmt.Errorf("find image: %w", err)
	}
	pack, err := m.kernelOf(t.rec.KernelID)
	if err != nil {
		return nil, err
	}
	var boxes []*box
	for len(*rooms) > 0 {
		r := (*rooms)[0]
		*rooms = (*rooms)[1:]
		unuse, _ := from.use() // it is open until this call ends
		b, _, err := m.launchNew(forkOf(t.rec), &boot{
			op: "fork", image: image, release: func() {}, kernel: pack, from: from, unuse: unuse, onlyCopy: true,
		}, r.grant, r.turn)
		if err != nil {
			unuse()
			return boxes, err
		}
		boxes = append(boxes, b)
	}
	return boxes, nil
}

// forkOf is the first record of a copy.
func forkOf(rec sandbox.Record) sandbox.Record {
	now := time.Now()
	return sandbox.Record{
		Version: sandbox.RecordVersion, ID: sandbox.NewID(), Spec: rec.Spec,
		State: sandbox.Pending, Cause: sandbox.ByUser,
		CreatedAt: now, ChangedAt: now, ActiveAt: now,
		ImageDigest: rec.ImageDigest, Env: rec.Env, User: rec.User, Cwd: rec.Cwd,
		MachineID: randomHex(16), Parent: rec.ID,
	}
}

// cloneDisk makes data disks of what was taken.
func (t *taken) cloneDisk(m *Manager) func(context.Context, string) error {
	return func(ctx context.Context, path string) error { return m.p.Disks.Clone(ctx, t.draft.Data(), path) }
}

// takeBack destroys sandboxes that nobody is told of.
func (m *Manager) takeBack(boxes []*box) error {
	ctx, cancel := context.WithTimeout(m.life, opTimeout)
	defer cancel()
	var errs []error
	for _, b := range boxes {
		if err := m.Destroy(ctx, b.id); err != nil && !fault.Is(err, fault.NotFound) {
			errs = append(errs, fmt.Errorf("take back copy %s: %w", b.id, err))
		}
	}
	return errors.Join(errs...)
}
