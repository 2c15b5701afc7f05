package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// CreateSnapshot writes down what a sandbox is now, under a name that creates
// can give as their template. The sandbox goes on when its memory and its disk
// are copied; stopped is how long it stood still for that.
func (m *Manager) CreateSnapshot(ctx context.Context, id sandbox.ID, name string) (_ SnapshotView, stopped time.Duration, err error) {
	b, done, err := m.prepareSnapshot(id, name)
	if err != nil {
		return SnapshotView{}, 0, err
	}
	defer done()
	t, err := m.take(ctx, b, "snapshot")
	if err != nil {
		return SnapshotView{}, 0, err
	}
	s, err := m.publish(t, name)
	if err != nil {
		return SnapshotView{}, t.stopped, fmt.Errorf("snapshot of sandbox %s: %w", id, err)
	}
	m.p.Log.Info("snapshot was made", slog.String("sandbox_id", string(id)), slog.String("name", name), slog.String("snapshot", s.snap.ID))
	return m.viewOf(s), t.stopped, nil
}

// prepareSnapshot checks what can be checked before the sandbox is stopped, and
// keeps the name until done.
func (m *Manager) prepareSnapshot(id sandbox.ID, name string) (b *box, done func(), err error) {
	if !m.stock.on() {
		return nil, nil, fault.New(fault.Unimplemented, "this host can't make snapshots")
	}
	if err := template.CheckName(name); err != nil {
		return nil, nil, err
	}
	if b, err = m.find(id); err != nil {
		return nil, nil, err
	}
	if err := b.unbound("written down as a snapshot"); err != nil {
		return nil, nil, err
	}
	_, _, release, err := m.p.Templates.Hold(name)
	if err == nil {
		release()
		return nil, nil, fault.New(fault.Exists, "a template is called %s already; choose another name", name)
	}
	if !fault.Is(err, fault.NotFound) {
		return nil, nil, err
	}
	if done, err = m.stock.reserve(name); err != nil {
		return nil, nil, err
	}
	return b, done, nil
}

// publish makes a snapshot of what was taken. A caller that gives up does not
// end it, for its sandbox was stopped for it already.
func (m *Manager) publish(t *taken, name string) (*still, error) {
	ctx, cancel := context.WithTimeout(m.closing, sleepTime)
	defer cancel()
	if err := m.at(ctx, t.rec.ID, "snapshot publish"); err != nil {
		return nil, errors.Join(err, t.drop())
	}
	config := guestDefaults(t.rec)
	s, err := t.publish(ctx, m, snapshot.Manifest{
		Kind: snapshot.Named, Name: name, Source: t.rec.ID, Parent: t.rec.Snapshot,
		Env: config.Env, User: config.DefaultUser, Cwd: config.DefaultCwd,
	})
	if err != nil {
		return nil, err
	}
	m.stock.add(s)
	return s, nil
}

// Snapshots returns all snapshots, oldest first: those with a name, warm
// templates, and the memories of hibernated sandboxes.
func (m *Manager) Snapshots() []SnapshotView {
	var all []SnapshotView
	for _, s := range m.stock.list() {
		all = append(all, m.viewOf(s))
	}
	for _, v := range m.List() {
		if v.State != sandbox.Hibernated {
			continue
		}
		if s, err := snapshot.Open(m.p.Memories.Hibernation(v.ID)); err == nil { // else it woke meanwhile
			all = append(all, SnapshotView{Manifest: s.Manifest, Users: []sandbox.ID{v.ID}, Problem: m.problem(s)})
		}
	}
	slices.SortFunc(all, func(a, b SnapshotView) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// VerifySnapshot reads every byte of a snapshot, by its id or its name, and
// compares it with the digests.
func (m *Manager) VerifySnapshot(ctx context.Context, idOrName string) (SnapshotView, error) {
	for _, v := range m.Snapshots() {
		if v.ID != idOrName && (v.Name == "" || v.Name != idOrName) {
			continue
		}
		s, err := snapshot.Open(m.snapshotDir(v))
		if err == nil {
			err = s.Verify(ctx)
		}
		return v, err
	}
	return SnapshotView{}, noSnapshot(idOrName)
}

func (m *Manager) snapshotDir(v SnapshotView) string {
	if s := m.stock.find(func(s *still) bool { return s.snap.ID == v.ID }); s != nil {
		return s.snap.Dir
	}
	return m.p.Memories.Hibernation(v.Source)
}

// DeleteSnapshot removes a snapshot by its id or its name. While there are
// sandboxes that were made from it, that takes force; they do not need it.
func (m *Manager) DeleteSnapshot(idOrName string, force bool) error {
	s := m.stock.find(func(s *still) bool { return s.snap.ID == idOrName || s.snap.Name != "" && s.snap.Name == idOrName })
	if s == nil {
		for _, v := range m.Snapshots() {
			if v.ID == idOrName {
				return fault.New(fault.Precondition, "it is the memory of sandbox %s, which is hibernated; destroy that, or resume it", v.Source)
			}
		}
		return noSnapshot(idOrName)
	}
	if users := m.usersOf(s); len(users) > 0 && !force {
		return fault.New(fault.Precondition, "sandboxes were made from snapshot %s: %s; they do not need it any more, force removes it", idOrName, someIDs(users))
	}
	return m.stock.remove(s)
}

func noSnapshot(idOrName string) error {
	return fault.New(fault.NotFound, "there is no snapshot %q; `hutch snapshot ls` shows those there are", idOrName)
}

// usersOf returns the sandboxes that were made from a still.
func (m *Manager) usersOf(s *still) []sandbox.ID {
	var users []sandbox.ID
	for _, v := range m.List() {
		if v.Snapshot == s.snap.ID {
			users = append(users, v.ID)
		}
	}
	return users
}

func (m *Manager) viewOf(s *still) SnapshotView {
	_, inRAM := s.lastUse()
	return SnapshotView{Manifest: s.snap.Manifest, Users: m.usersOf(s), InRAM: inRAM, Problem: m.problem(s.snap)}
}

// problem tells why a snapshot can't be started on this host now.
func (m *Manager) problem(s *snapshot.Snapshot) string {
	_, err := m.kernelOf(s.Fits.KernelID)
	if err == nil {
		err = s.Fits.Check(m.fits(s.Fits.KernelID, s.Fits.VCPUs, s.Fits.MemoryMB))
	}
	if err == nil {
		_, err = m.p.Templates.Image(s.ImageDigest)
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// someIDs lists ids for people, not too many.
func someIDs(ids []sandbox.ID) string {
	const named = 5
	var words []string
	for _, id := range ids[:min(named, len(ids))] {
		words = append(words, string(id))
	}
	if len(ids) > named {
		words = append(words, "...")
	}
	return strings.Join(words, ", ")
}
