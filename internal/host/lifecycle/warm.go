package lifecycle

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/template"
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

// Warm says what is kept to start sandboxes from.
type Warm struct {
	// Auto makes a warm template of every shape that was booted.
	Auto bool
	// MemoryMB bounds what is kept in RAM, and DiskMB what is kept on disk: the
	// bytes that are not zero. Those used least lately go first, one always
	// stays. 0: no bound.
	MemoryMB int
	DiskMB   int
}

// warmPurpose is the purpose of a sandbox that is booted to be copied.
const warmPurpose = "warm"

// warmTime bounds the making of one warm template beyond its boot.
const warmTime = 5 * time.Minute

// warmKey is a shape of an image on this host.
type warmKey struct {
	image  string // digest
	fits   snapshot.Fits
	diskMB int
}

// shape is the key of what a spec asks for.
func (m *Manager) shape(spec sandbox.Spec, t template.Template, pack kernel.Pack) warmKey {
	return warmKey{image: t.ImageDigest, fits: m.fits(pack.ID, spec.VCPUs, spec.MemoryMB), diskMB: spec.DiskMB}
}

// warmTemplate is a machine that was booted in a shape: on disk, and in RAM
// when it was used lately.
type warmTemplate struct {
	key  warmKey
	snap *snapshot.Snapshot

	loading sync.Mutex // held while it is read into RAM

	mu     sync.Mutex
	loaded *origin
	usedAt time.Time
	gone   bool
}

// load returns the machine in RAM, and reads it when it is not there.
func (w *warmTemplate) load(ctx context.Context) (*origin, error) {
	if o := w.inRAM(); o != nil {
		return o, nil
	}
	w.loading.Lock()
	defer w.loading.Unlock()
	if o := w.inRAM(); o != nil {
		return o, nil
	}
	memory, err := w.snap.LoadMemory(ctx)
	if err != nil {
		return nil, err
	}
	state, err := w.snap.CopyState(ctx)
	if err == nil {
		err = errors.Join(snapshot.Seal(memory), snapshot.Seal(state))
	}
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	o := &origin{state: state, memory: memory, data: w.snap.CopyData}
	w.keep(o)
	return o, nil
}

func (w *warmTemplate) inRAM() *origin {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.usedAt = time.Now()
	return w.loaded
}

func (w *warmTemplate) keep(o *origin) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gone {
		o.close()
		return
	}
	w.loaded, w.usedAt = o, time.Now()
}

// unload frees the RAM, once those that just start from it have.
func (w *warmTemplate) unload(gone bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gone = w.gone || gone
	if w.loaded != nil {
		w.loaded.close()
	}
	w.loaded = nil
}

func (w *warmTemplate) lastUse() (at time.Time, inRAM bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.usedAt, w.loaded != nil
}

// warmer owns the warm templates of a Manager.
type warmer struct {
	m *Manager

	mu       sync.Mutex
	all      map[warmKey]*warmTemplate
	building map[warmKey]*warmBuild
	failed   map[warmKey]bool // made by itself and did not work: not again
	auto     chan struct{}    // capacity 1: one is made by itself at a time
}

// warmBuild is a warm template in the making, for all who wait for it.
type warmBuild struct {
	done chan struct{}
	snap *snapshot.Snapshot // set before done is closed
	err  error
}

func newWarmer(m *Manager) *warmer {
	return &warmer{
		m: m, all: map[warmKey]*warmTemplate{}, building: map[warmKey]*warmBuild{}, failed: map[warmKey]bool{},
		auto: make(chan struct{}, 1),
	}
}

// on tells whether this host can have warm templates at all.
func (w *warmer) on() bool { return w.m.p.Snapshots != nil && w.m.p.Driver.Caps().Snapshots }

// open takes up the warm templates on disk, and removes those that fit neither
// this host nor any image any more.
func (w *warmer) open() {
	if !w.on() {
		return
	}
	list, damaged := w.m.p.Snapshots.List()
	if damaged != nil {
		w.m.p.Log.Warn("some snapshots can't be used", slog.Any("error", damaged))
	}
	for _, s := range list {
		if s.Kind != snapshot.Warm {
			continue
		}
		err := s.Fits.Check(w.m.fits(w.m.anyKernel().ID, s.Fits.VCPUs, s.Fits.MemoryMB))
		if err == nil {
			_, err = w.m.p.Templates.Image(s.ImageDigest)
		}
		if err != nil {
			w.m.p.Log.Info("warm template is of no use any more", slog.String("snapshot", s.ID), slog.Any("reason", err))
			w.drop(s)
			continue
		}
		w.add(keyOf(s), &warmTemplate{key: keyOf(s), snap: s, usedAt: s.CreatedAt})
	}
}

func keyOf(s *snapshot.Snapshot) warmKey {
	return warmKey{image: s.ImageDigest, fits: s.Fits, diskMB: s.DiskMB}
}

func (w *warmer) drop(s *snapshot.Snapshot) {
	if err := w.m.p.Snapshots.Remove(s.ID); err != nil {
		w.m.p.Log.Warn("snapshot can't be removed", slog.Any("error", err))
	}
}

// load has a warm template in RAM, and unloads others to stay within the budget.
func (w *warmer) load(ctx context.Context, t *warmTemplate) (*origin, error) {
	o, err := t.load(ctx)
	if err == nil {
		w.trim(t)
	}
	return o, err
}

// find returns the warm template of a shape; nil: none.
func (w *warmer) find(k warmKey) *warmTemplate {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.all[k]
}

// add adds a warm template, and removes what is over the budgets.
func (w *warmer) add(k warmKey, t *warmTemplate) {
	w.mu.Lock()
	old := w.all[k]
	w.all[k] = t
	w.mu.Unlock()
	if old != nil {
		old.unload(true)
		w.drop(old.snap)
	}
	w.trim(t)
}

// trim removes what was used least lately from RAM and from disk, until both
// are within their budgets; latest stays.
func (w *warmer) trim(latest *warmTemplate) {
	w.mu.Lock()
	list := make([]*warmTemplate, 0, len(w.all))
	for _, t := range w.all {
		if t != latest {
			list = append(list, t)
		}
	}
	w.mu.Unlock()
	slices.SortFunc(list, func(a, b *warmTemplate) int { // used latest first
		at, _ := a.lastUse()
		bt, _ := b.lastUse()
		return bt.Compare(at)
	})
	memory, disk := latest.memoryBytes(), latest.diskBytes()
	for _, t := range list {
		disk += t.diskBytes()
		if over(disk, w.m.p.Warm.DiskMB) {
			w.remove(t)
			continue
		}
		if _, inRAM := t.lastUse(); !inRAM {
			continue
		}
		if memory += t.memoryBytes(); over(memory, w.m.p.Warm.MemoryMB) {
			t.unload(false)
		}
	}
}

func over(bytes int64, mb int) bool { return mb > 0 && bytes > int64(mb)<<20 }

func (w *warmTemplate) memoryBytes() int64 { return w.snap.Memory.Stored }

func (w *warmTemplate) diskBytes() int64 { return w.snap.Stored() }

func (w *warmer) remove(t *warmTemplate) {
	w.mu.Lock()
	if w.all[t.key] == t {
		delete(w.all, t.key)
	}
	w.mu.Unlock()
	t.unload(true)
	w.drop(t.snap)
}

// close frees the RAM.
func (w *warmer) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.all {
		t.unload(true)
	}
}

// WarmTemplate makes a template warm in a shape: a sandbox is booted, copied
// while it stands still, and destroyed. It returns at once what is warm already.
// Zero values are those of a create.
func (m *Manager) WarmTemplate(ctx context.Context, spec sandbox.Spec) (*snapshot.Snapshot, error) {
	if !m.warm.on() {
		return nil, fault.New(fault.Unimplemented, "this host can't make warm templates")
	}
	t, _, release, err := m.hold(spec)
	if err != nil {
		return nil, err
	}
	defer release()
	spec, err = validate(complete(spec, t), m.p.Driver.Caps().MaxVCPUs)
	if err != nil {
		return nil, err
	}
	pack, err := m.p.Kernel()
	if err != nil {
		return nil, fmt.Errorf("find kernel: %w", err)
	}
	k := m.shape(spec, t, pack)
	if w := m.warm.find(k); w != nil {
		return w.snap, nil
	}
	build, mine := m.warm.join(k)
	if mine {
		m.mu.Lock()
		err := m.openLocked()
		if err == nil {
			m.wg.Go(func() { m.warm.build(k, spec, build) })
		}
		m.mu.Unlock()
		if err != nil {
			m.warm.finish(k, build, nil, err)
		}
	}
	select {
	case <-build.done:
		return build.snap, build.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// join returns the build of a shape, and whether the caller is to do it.
func (w *warmer) join(k warmKey) (b *warmBuild, mine bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b := w.building[k]; b != nil {
		return b, false
	}
	b = &warmBuild{done: make(chan struct{})}
	w.building[k] = b
	return b, true
}

func (w *warmer) finish(k warmKey, b *warmBuild, snap *snapshot.Snapshot, err error) {
	w.mu.Lock()
	delete(w.building, k)
	w.mu.Unlock()
	b.snap, b.err = snap, err
	close(b.done)
}

// wish makes a shape warm in the background, if that is wanted and nothing else
// is being made warm by itself.
func (w *warmer) wish(k warmKey, spec sandbox.Spec) {
	if !w.m.p.Warm.Auto || !w.on() || spec.Purpose != "" || spec.ColdStart || w.find(k) != nil {
		return
	}
	w.mu.Lock()
	tried := w.failed[k]
	w.mu.Unlock()
	if tried {
		return
	}
	select {
	case w.auto <- struct{}{}:
	default:
		return
	}
	w.m.wg.Go(func() {
		defer func() { <-w.auto }()
		if _, err := w.m.WarmTemplate(w.m.closing, spec); err != nil {
			w.m.p.Log.Warn("template can't be made warm", slog.String("template", spec.Template), slog.Any("error", err))
			w.mu.Lock()
			w.failed[k] = true
			w.mu.Unlock()
		}
	})
}

// build makes a warm template.
func (w *warmer) build(k warmKey, spec sandbox.Spec, b *warmBuild) {
	snap, err := w.make(k, spec)
	if err != nil {
		err = fmt.Errorf("make template %s warm: %w", spec.Template, err)
	}
	w.finish(k, b, snap, err)
}

func (w *warmer) make(k warmKey, spec sandbox.Spec) (_ *snapshot.Snapshot, err error) {
	began := time.Now()
	shape := sandbox.Spec{
		Template: spec.Template, VCPUs: spec.VCPUs, MemoryMB: spec.MemoryMB, DiskMB: spec.DiskMB,
		Network: sandbox.Policy{Mode: sandbox.ModeNone}, ColdStart: true, Purpose: warmPurpose,
	}
	view, err := w.m.Create(w.m.closing, sandbox.ID("warm-"+randomHex(8)), shape)
	if err != nil {
		return nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(w.m.life, opTimeout)
		defer cancel()
		if gone := w.m.Destroy(ctx, view.ID); gone != nil && !fault.Is(gone, fault.NotFound) && err == nil {
			w.m.p.Log.Warn("sandbox of a warm template can't be destroyed", slog.Any("error", gone))
		}
	}()
	b, err := w.m.find(view.ID)
	if err != nil {
		return nil, err
	}
	var t *warmTemplate
	err = b.ask(w.m.life, sandbox.Snapshot, true, func() error {
		var err error
		t, err = b.writeWarm(k)
		return err
	})
	if err != nil {
		return nil, err
	}
	w.add(k, t)
	w.m.p.Log.Info("template is warm", slog.String("template", spec.Template), slog.Int("vcpus", spec.VCPUs),
		slog.Int("memory_mb", spec.MemoryMB), slog.String("snapshot", t.snap.ID), slog.Duration("took", time.Since(began)))
	return t.snap, nil
}

// writeWarm writes the sandbox down as a warm template. It does not go on.
func (b *box) writeWarm(k warmKey) (_ *warmTemplate, err error) {
	ctx, cancel := context.WithTimeout(b.life, warmTime)
	defer cancel()
	b.exercise(ctx)
	c, err := b.capture(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.fits(b).Check(k.fits); err != nil {
		return nil, err
	}
	id := snapshot.NewID()
	draft, err := b.m.p.Snapshots.Begin(id)
	if err != nil {
		return nil, err
	}
	if err := b.m.p.Disks.Clone(ctx, b.m.p.Records.DataDisk(b.id), draft.Data()); err != nil {
		return nil, errors.Join(err, draft.Drop())
	}
	snap, err := draft.Publish(ctx, snapshot.Manifest{
		ID: id, Kind: snapshot.Warm, CreatedAt: time.Now(), Fits: k.fits, DiskMB: k.diskMB,
		ImageDigest: b.rec.ImageDigest, Template: b.rec.Spec.Template,
	}, c.state, c.memory)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(snapshot.Seal(c.memory), snapshot.Seal(c.state)); err != nil {
		return nil, errors.Join(err, b.m.p.Snapshots.Remove(id))
	}
	return &warmTemplate{
		key: k, snap: snap, usedAt: time.Now(), loaded: &origin{state: c.state, memory: c.memory, data: snap.CopyData},
	}, nil
}

// exercise has the guest do once what its copies are asked first, so that they
// need not do it for the first time. Whether it works does not matter.
func (b *box) exercise(ctx context.Context) {
	if _, _, err := b.guest.Memory(ctx); err != nil {
		b.log.Debug("guest was not exercised", slog.Any("error", err))
	}
	for _, cmd := range []string{"/bin/true", "true"} {
		if _, err := b.guest.Exec(ctx, guestconn.Exec{Cmd: cmd, Timeout: opTimeout}); err == nil {
			return
		}
	}
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

// newUUID returns a random UUID, version 4 of RFC 9562.
func newUUID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails, see crypto/rand
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
