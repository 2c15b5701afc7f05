package lifecycle

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Warm says what is kept to start sandboxes from.
type Warm struct {
	// Auto makes a warm template of every shape that was booted.
	Auto bool
	// MemoryMB bounds what is kept in RAM, and DiskMB what is kept on disk: the
	// bytes that are not zero. Those used least lately go first, one always
	// stays. 0: no bound.
	MemoryMB int
	DiskMB   int
	// Spares is how many sandboxes are kept started ahead, one for each of the
	// shapes that were copied last.
	Spares int
	// Rest is how long a machine is left alone before it is written down.
	Rest time.Duration
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

// warmer makes warm templates.
type warmer struct {
	m *Manager

	mu       sync.Mutex
	building map[warmKey]*warmBuild
	failed   map[warmKey]bool // made by itself and did not work: not again
	auto     chan struct{}    // capacity 1: one is made by itself at a time
}

// warmBuild is a warm template in the making, for all who wait for it.
type warmBuild struct {
	done chan struct{}
	snap *snapshot.Snapshot // set before done is closed
	err  error

	ready snapshot.Ready // what is up in it
	id    sandbox.ID     // of the sandbox that is booted for it
	asked bool           // a caller wants it; guarded by mu of warmer
	gave  bool           // it gave way; guarded by mu of warmer
}

// roomNeeded is why a sandbox of hutchd's own went.
const roomNeeded = "its room was needed"

// errGaveWay ends what was made warm for nobody who waits.
var errGaveWay = errors.New(roomNeeded)

func newWarmer(m *Manager) *warmer {
	return &warmer{
		m: m, building: map[warmKey]*warmBuild{}, failed: map[warmKey]bool{},
		auto: make(chan struct{}, 1),
	}
}

// warmWish is a shape that is to be warm, with something up in it.
type warmWish struct {
	spec  sandbox.Spec
	ready snapshot.Ready
	asked bool // a caller wants it
}

// WarmTemplate makes a template warm in a shape: a sandbox is booted, what is to
// be ready is brought up in it, it is copied while it stands still, and
// destroyed. It returns at once what is warm already, and replaces what is warm
// but has something else up. Zero values are those of a create. A guest that
// can't bring it up is fault.Unimplemented or fault.Precondition; then what was
// warm stays.
func (m *Manager) WarmTemplate(ctx context.Context, spec sandbox.Spec, ready snapshot.Ready) (*snapshot.Snapshot, error) {
	return m.warmTemplate(ctx, warmWish{spec, ready, true})
}

func (m *Manager) warmTemplate(ctx context.Context, wish warmWish) (*snapshot.Snapshot, error) {
	if !m.stock.on() {
		return nil, fault.New(fault.Unimplemented, "this host can't make warm templates")
	}
	if wish.ready != "" {
		if _, err := readinessOf(wish.ready); err != nil {
			return nil, err
		}
	}
	src, err := m.hold(wish.spec)
	if err != nil {
		return nil, err
	}
	defer src.release()
	if src.still != nil {
		return nil, fault.BadField("name", "%s is a snapshot, which sandboxes are copies of anyway", src.template.Name)
	}
	wish.spec, err = validate(src.complete(wish.spec), m.p.Driver.Caps().MaxVCPUs)
	if err != nil {
		return nil, err
	}
	pack, err := m.p.Kernel()
	if err != nil {
		return nil, fmt.Errorf("find kernel: %w", err)
	}
	return m.warm.get(ctx, m.shape(wish.spec, src.template, pack), wish)
}

// get returns the warm template of a shape, and has it made when there is none
// that does.
func (w *warmer) get(ctx context.Context, k warmKey, wish warmWish) (*snapshot.Snapshot, error) {
	for {
		if warm := w.m.stock.warm(k); warm != nil && does(warm.snap.Ready, wish.ready) {
			return warm.snap, nil
		}
		build := w.join(k, wish)
		select {
		case <-build.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if does(build.ready, wish.ready) {
			return build.snap, build.err
		}
	}
}

// does tells whether a machine that has something up is one that was wished for.
func does(has, wish snapshot.Ready) bool { return wish == "" || has == wish }

// join returns the build of a shape, which it begins when there is none. It may
// be one with something else up.
func (w *warmer) join(k warmKey, wish warmWish) *warmBuild {
	w.mu.Lock()
	b, there := w.building[k]
	if there {
		b.asked = b.asked || wish.asked
	} else {
		b = &warmBuild{done: make(chan struct{}), ready: wish.ready, asked: wish.asked, id: sandbox.ID("warm-" + randomHex(4))}
		w.building[k] = b
	}
	w.mu.Unlock()
	if !there {
		w.begin(k, wish.spec, b)
	}
	return b
}

func (w *warmer) begin(k warmKey, spec sandbox.Spec, b *warmBuild) {
	w.m.mu.Lock()
	err := w.m.openLocked()
	if err == nil {
		w.m.wg.Go(func() { w.build(k, spec, b) })
	}
	w.m.mu.Unlock()
	if err != nil {
		w.finish(k, b, nil, err)
	}
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
	if !w.m.p.Warm.Auto || !w.m.stock.on() || spec.Purpose != "" || spec.ColdStart || w.m.stock.warm(k) != nil {
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
		if err := w.warmQuietly(warmWish{spec: spec}); err != nil && !noRoom(err) {
			w.mu.Lock()
			w.failed[k] = true
			w.mu.Unlock()
		}
	})
}

// again makes shapes warm whose templates did not fit any more.
func (w *warmer) again(shapes []warmWish) {
	for _, wish := range shapes {
		select {
		case w.auto <- struct{}{}:
		case <-w.m.closing.Done():
			return
		}
		_ = w.warmQuietly(wish) // logged; the next may do
		<-w.auto
	}
}

// warmQuietly makes a shape warm when nothing else starts, for nobody who waits.
// It logs its error.
func (w *warmer) warmQuietly(wish warmWish) error {
	err := w.m.admission.whenCalm(w.m.closing)
	if err == nil {
		_, err = w.m.warmTemplate(w.m.closing, wish)
	}
	switch {
	case err == nil || w.m.closing.Err() != nil:
	case noRoom(err):
		w.m.p.Log.Info("template is not made warm now", slog.String("template", wish.spec.Template), slog.Any("error", err))
	default:
		w.m.p.Log.Warn("template can't be made warm", slog.String("template", wish.spec.Template), slog.Any("error", err))
	}
	return err
}

// noRoom tells whether it is no fault of a shape that it could not be made warm.
func noRoom(err error) bool { return errors.Is(err, errGaveWay) || fault.Is(err, fault.Exhausted) }

// giveWay ends what is made warm for nobody who waits, and tells whether there
// was any.
func (w *warmer) giveWay() bool {
	w.mu.Lock()
	var tries []*attempt
	for _, build := range w.building {
		if b := w.m.lookup(build.id); b != nil && !build.asked {
			build.gave = true
			if a := b.askDestroy(sandbox.ByHost, roomNeeded); a != nil {
				tries = append(tries, a)
			}
		}
	}
	w.mu.Unlock()
	for _, a := range tries {
		<-a.done
	}
	return len(tries) > 0
}

// build makes a warm template.
func (w *warmer) build(k warmKey, spec sandbox.Spec, b *warmBuild) {
	snap, err := w.make(k, spec, b)
	w.mu.Lock()
	if err != nil && b.gave {
		err = errGaveWay
	}
	w.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("make template %s warm: %w", spec.Template, err)
	}
	w.finish(k, b, snap, err)
}

func (w *warmer) make(k warmKey, spec sandbox.Spec, build *warmBuild) (_ *snapshot.Snapshot, err error) {
	began := time.Now()
	shape := bareSpec(spec, warmPurpose)
	shape.ColdStart, shape.Network = true, sandbox.Policy{Mode: sandbox.ModeNone}
	view, err := w.m.Create(w.m.closing, build.id, shape)
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
	var t *still
	err = b.ask(w.m.life, sandbox.Snapshot, true, func() error {
		var err error
		t, err = b.writeWarm(k, build.ready)
		return err
	})
	if err != nil {
		return nil, err
	}
	w.m.stock.add(t)
	w.m.p.Log.Info("template is warm", slog.String("template", spec.Template), slog.Int("vcpus", spec.VCPUs),
		slog.Int("memory_mb", spec.MemoryMB), slog.String("ready", string(build.ready)), slog.String("snapshot", t.snap.ID), slog.Duration("took", time.Since(began)))
	return t.snap, nil
}

// bareSpec is a sandbox of a shape that hutchd makes for itself.
func bareSpec(shape sandbox.Spec, purpose string) sandbox.Spec {
	return sandbox.Spec{
		Template: shape.Template, VCPUs: shape.VCPUs, MemoryMB: shape.MemoryMB, DiskMB: shape.DiskMB,
		Network: sandbox.Policy{Mode: sandbox.ModeInternet}, Purpose: purpose,
	}
}

// writeWarm writes the sandbox down as a warm template, when something is up in
// it. It does not go on.
func (b *box) writeWarm(k warmKey, ready snapshot.Ready) (*still, error) {
	if err := b.getReady(ready); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(b.life, warmTime)
	defer cancel()
	b.exercise(ctx)
	b.rehearse(ctx)
	c, err := b.capture(ctx, b.m.p.Warm.Rest)
	if err != nil {
		return nil, err
	}
	t := newTaken(b, c)
	err = t.fit.Check(k.fits)
	if err == nil {
		err = t.copyDisk(ctx, b, "warm")
	}
	if err != nil {
		return nil, errors.Join(err, t.drop())
	}
	return t.publish(ctx, b.m, snapshot.Manifest{Kind: snapshot.Warm, Ready: ready})
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

// rehearse has the guest be held and woken once, as its copies will be, which
// then find there what that takes.
func (b *box) rehearse(ctx context.Context) {
	if _, err := b.guest.Quiesce(ctx); err != nil {
		return // so will the next, which tells it
	}
	if _, err := b.guest.Configure(ctx, b.guestConfig()); err != nil {
		b.log.Debug("guest was not woken", slog.Any("error", err))
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
