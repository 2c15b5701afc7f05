package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Snapshots keeps snapshots. It is *snapshot.Store.
type Snapshots interface {
	// Begin begins the snapshot with an id of snapshot.NewID.
	Begin(id string) (*snapshot.Draft, error)
	// List returns all that can be opened, and why others can't.
	List() ([]*snapshot.Snapshot, error)
	// Remove removes one. An unknown id is no error.
	Remove(id string) error
}

// still is a machine that stood still, and that sandboxes are started from: on
// disk, and in RAM when it was used lately.
type still struct {
	snap *snapshot.Snapshot

	loading sync.Mutex // held while it is read into RAM

	mu     sync.Mutex
	loaded *origin
	usedAt time.Time
	users  int // starts on their way that must not lose it
	gone   bool
}

// newStill returns a still; from may be nil.
func newStill(s *snapshot.Snapshot, from *origin) *still {
	return &still{snap: s, usedAt: time.Now(), loaded: from}
}

// key is the shape of a still.
func (s *still) key() warmKey {
	return warmKey{image: s.snap.ImageDigest, fits: s.snap.Fits, diskMB: s.snap.DiskMB}
}

// load returns the machine in RAM, and reads it when it is not there.
func (s *still) load(ctx context.Context) (*origin, error) {
	if o := s.inRAM(); o != nil {
		return o, nil
	}
	s.loading.Lock()
	defer s.loading.Unlock()
	if o := s.inRAM(); o != nil {
		return o, nil
	}
	memory, err := s.snap.LoadMemory(ctx)
	if err != nil {
		return nil, err
	}
	state, err := s.snap.CopyState(ctx)
	if err == nil {
		err = errors.Join(snapshot.Seal(memory), snapshot.Seal(state))
	}
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	o := &origin{state: state, memory: memory}
	if err := o.takeDisk(ctx, s.snap); err != nil {
		o.close()
		return nil, err
	}
	s.keep(o)
	return o, nil
}

func (s *still) inRAM() *origin {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.usedAt = time.Now()
	return s.loaded
}

func (s *still) keep(o *origin) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		o.close()
		return
	}
	s.loaded, s.usedAt = o, time.Now()
}

// unload frees the RAM, once those that just start from it have.
func (s *still) unload() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unloadLocked()
}

func (s *still) unloadLocked() {
	if s.loaded != nil {
		s.loaded.close()
	}
	s.loaded = nil
}

// hold keeps the still from being removed until release, which may be called
// more than once. ok is false when it is gone.
func (s *still) hold() (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return nil, false
	}
	s.users++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.users--
	}), true
}

// leave ends the still, unless somebody holds it.
func (s *still) leave() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users > 0 {
		return false
	}
	s.gone = true
	s.unloadLocked()
	return true
}

func (s *still) lastUse() (at time.Time, inRAM bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usedAt, s.loaded != nil
}

// stock owns the stills of a Manager: which there are, and which of them are in
// RAM.
type stock struct {
	m *Manager

	mu       sync.Mutex
	all      map[string]*still // by the snapshot's id; guarded by mu
	reserved map[string]bool   // names of snapshots in the making; guarded by mu
}

func newStock(m *Manager) *stock {
	return &stock{m: m, all: map[string]*still{}, reserved: map[string]bool{}}
}

// on tells whether this host can have stills at all.
func (k *stock) on() bool { return k.m.p.Snapshots != nil && k.m.p.Driver.Caps().Snapshots }

// open takes up the snapshots on disk. Warm templates that do not fit this host
// any more, or whose image is gone, are removed; what they were is returned.
func (k *stock) open() (stale []warmWish) {
	if !k.on() {
		return nil
	}
	list, damaged := k.m.p.Snapshots.List()
	if damaged != nil {
		k.m.p.Log.Warn("some snapshots can't be used", slog.Any("error", damaged))
	}
	for _, s := range list {
		if why := k.useless(s); why != nil {
			k.m.p.Log.Info("warm template is of no use any more", slog.String("snapshot", s.ID), slog.Any("reason", why))
			k.drop(s)
			stale = append(stale, warmWish{spec: shapeOf(s), ready: s.Ready})
			continue
		}
		one := newStill(s, nil)
		one.usedAt = s.CreatedAt
		k.mu.Lock()
		k.all[s.ID] = one
		k.mu.Unlock()
	}
	k.trim(nil)
	return stale
}

// shapeOf is a spec of the shape that a snapshot has.
func shapeOf(s *snapshot.Snapshot) sandbox.Spec {
	return sandbox.Spec{Template: s.Template, VCPUs: s.Fits.VCPUs, MemoryMB: s.Fits.MemoryMB, DiskMB: s.DiskMB}
}

// useless tells why a snapshot is not worth keeping. Nil: it is.
func (k *stock) useless(s *snapshot.Snapshot) error {
	if s.Kind != snapshot.Warm {
		return nil
	}
	if err := s.Fits.Check(k.m.fits(k.m.anyKernel().ID, s.Fits.VCPUs, s.Fits.MemoryMB)); err != nil {
		return err
	}
	_, err := k.m.p.Templates.Image(s.ImageDigest)
	return err
}

func (k *stock) drop(s *snapshot.Snapshot) {
	if err := k.m.p.Snapshots.Remove(s.ID); err != nil {
		k.m.p.Log.Warn("snapshot can't be removed", slog.Any("error", err))
	}
}

// list returns all stills, in no order.
func (k *stock) list() []*still {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]*still, 0, len(k.all))
	for _, s := range k.all {
		all = append(all, s)
	}
	return all
}

// find returns one that is as asked; nil: none.
func (k *stock) find(is func(*still) bool) *still {
	all := k.list()
	if i := slices.IndexFunc(all, is); i >= 0 {
		return all[i]
	}
	return nil
}

// warm returns the warm template of a shape, the latest when it replaces
// others; nil: none.
func (k *stock) warm(key warmKey) *still {
	var latest *still
	for _, s := range k.list() {
		if s.snap.Kind == snapshot.Warm && s.key() == key && (latest == nil || s.snap.CreatedAt.After(latest.snap.CreatedAt)) {
			latest = s
		}
	}
	return latest
}

// named returns the snapshot with a name; nil: none.
func (k *stock) named(name string) *still {
	return k.find(func(s *still) bool { return s.snap.Kind == snapshot.Named && s.snap.Name == name })
}

// reserve keeps a name until release.
func (k *stock) reserve(name string) (release func(), err error) {
	there := k.named(name) != nil
	k.mu.Lock()
	defer k.mu.Unlock()
	if there || k.reserved[name] {
		return nil, fault.New(fault.Exists, "a snapshot is called %s already; remove it first, or choose another name", name)
	}
	k.reserved[name] = true
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.reserved, name)
	}, nil
}

// load has a still in RAM, and unloads others to stay within the budget.
func (k *stock) load(ctx context.Context, s *still) (*origin, error) {
	o, err := s.load(ctx)
	if err == nil {
		k.trim(s)
	}
	return o, err
}

// add adds a still, and removes what it replaces and what is over the budgets.
func (k *stock) add(s *still) {
	k.mu.Lock()
	k.all[s.snap.ID] = s
	k.mu.Unlock()
	k.trim(s)
}

// remove removes a still from disk and from RAM.
func (k *stock) remove(s *still) error {
	if !s.leave() {
		return fault.New(fault.Precondition, "a sandbox is just being made from snapshot %s; try again", s.snap.ID)
	}
	k.mu.Lock()
	delete(k.all, s.snap.ID)
	k.mu.Unlock()
	if err := k.m.p.Snapshots.Remove(s.snap.ID); err != nil {
		return fmt.Errorf("%w; the next hutchd finds it again", err)
	}
	return nil
}

// retire removes warm templates that were replaced. One that is just being
// copied goes the next time.
func (k *stock) retire() {
	for _, s := range k.list() {
		if s.snap.Kind == snapshot.Warm && k.warm(s.key()) != s {
			k.m.spares.retire(s.snap.ID)
			k.forget(s)
		}
	}
}

// trim removes what was replaced, and what was used least lately from RAM, and
// warm templates from disk, until both are within their budgets. latest, if
// there is one, stays.
func (k *stock) trim(latest *still) {
	k.retire()
	list := k.list()
	slices.SortFunc(list, func(a, b *still) int { // used latest first
		at, _ := a.lastUse()
		bt, _ := b.lastUse()
		return bt.Compare(at)
	})
	var memory, disk int64
	for _, s := range list {
		if s.snap.Kind == snapshot.Warm {
			disk += s.snap.Stored()
			if s != latest && over(disk, k.m.p.Warm.DiskMB) {
				k.forget(s)
				continue
			}
		}
		if _, inRAM := s.lastUse(); !inRAM {
			continue
		}
		if memory += bytesInRAM(s.snap); s != latest && over(memory, k.m.p.Warm.MemoryMB) {
			s.unload()
		}
	}
}

// forget removes a warm template that has no place any more.
func (k *stock) forget(s *still) {
	if err := k.remove(s); err != nil && !fault.Is(err, fault.Precondition) {
		k.m.p.Log.Warn("warm template can't be removed", slog.Any("error", err))
	}
}

func over(bytes int64, mb int) bool { return mb > 0 && bytes > int64(mb)<<20 }

// close frees the RAM.
func (k *stock) close() {
	for _, s := range k.list() {
		s.unload()
	}
}
