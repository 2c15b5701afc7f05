package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// parallel bounds how many sandboxes are recovered or stopped at a time.
const parallel = 8

// Manager owns the sandboxes of a host. It is safe for concurrent use between
// Start and Close; before and after, every call is fault.Unavailable.
type Manager struct {
	p         Params
	admission *admission
	stock     *stock
	warm      *warmer
	spares    *spares
	bootID    string

	life    context.Context // ends when Close has no more time
	endLife context.CancelCauseFunc
	closing context.Context // ends when Close begins
	close   context.CancelCauseFunc
	work    chan struct{}  // a slot for each of parallel
	wg      sync.WaitGroup // every goroutine of the Manager

	mu          sync.Mutex // guards what follows
	phase       phase
	keepVMs     bool
	boxes       map[sandbox.ID]*box
	quarantined map[sandbox.ID]store.Quarantined
}

type phase uint8

const (
	fresh phase = iota
	starting
	open
	closed
)

var _ Sandboxes = (*Manager)(nil)

// New returns a Manager that has not touched anything yet.
func New(p Params) (*Manager, error) {
	switch {
	case p.Driver == nil, p.Slots == nil, p.Records == nil, p.Events == nil, p.Disks == nil, p.Templates == nil,
		p.Kernel == nil, p.Connect == nil, p.RunDir == "", p.Log == nil:
		return nil, errors.New("lifecycle: a parameter that must be set is not")
	}
	p = p.withDefaults()
	dir, err := filepath.Abs(p.RunDir)
	if err != nil {
		return nil, fmt.Errorf("find run directory: %w", err)
	}
	p.RunDir = dir
	if p.BootID == "" {
		id, err := hostBootID()
		if err != nil {
			return nil, err
		}
		p.BootID = id
	}
	m := &Manager{
		p: p, bootID: p.BootID,
		admission: newAdmission(p.Limits, p.Driver.Caps().MemoryOverheadMB, p.Capacity),
		work:      make(chan struct{}, parallel),
		boxes:     map[sandbox.ID]*box{}, quarantined: map[sandbox.ID]store.Quarantined{},
	}
	m.stock, m.warm, m.spares = newStock(m), newWarmer(m), newSpares(m)
	return m, nil
}

// Close stops the Manager: nothing new begins, starts in flight are taken
// back, and every VM is let go of so that the next hutchd adopts it. With
// keepVMs false guests are shut down instead, and ended when they do not power
// off in time; their sandboxes can be resumed later. When ctx ends first, VMs
// that are not down by then are left running. Close returns when all is done.
func (m *Manager) Close(ctx context.Context, keepVMs bool) error {
	m.mu.Lock()
	if m.phase != open && m.phase != starting {
		m.phase = closed
		m.mu.Unlock()
		return nil
	}
	m.phase = closed
	m.keepVMs = keepVMs
	m.mu.Unlock()
	m.close(cancelCause{stopping()})
	stop := context.AfterFunc(ctx, func() { m.endLife(cancelCause{stopping()}) })
	m.wg.Wait()
	m.stock.close()
	stop()
	m.endLife(nil)
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("stop sandboxes: %w", err)
	}
	return nil
}

// List implements Sandboxes. What a View refers to must not be changed.
func (m *Manager) List() []View {
	return slices.DeleteFunc(m.views(), func(v View) bool { return v.Spec.Purpose != "" })
}

// views is List, with the sandboxes that hutchd made for itself.
func (m *Manager) views() []View {
	m.mu.Lock()
	boxes := make([]*box, 0, len(m.boxes))
	for _, b := range m.boxes {
		boxes = append(boxes, b)
	}
	m.mu.Unlock()
	views := make([]View, 0, len(boxes))
	for _, b := range boxes {
		if v := b.view(); v.State != sandbox.Gone {
			views = append(views, v)
		}
	}
	slices.SortFunc(views, func(a, b View) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return views
}

// Get implements Sandboxes. A whole id wins over what it is a prefix of.
func (m *Manager) Get(idOrPrefix string) (View, error) {
	b, err := m.find(sandbox.ID(idOrPrefix))
	if err == nil {
		return b.view(), nil
	}
	if idOrPrefix == "" || !fault.Is(err, fault.NotFound) {
		return View{}, err
	}
	var matches []View
	for _, v := range m.List() {
		if strings.HasPrefix(string(v.ID), idOrPrefix) {
			matches = append(matches, v)
		}
	}
	switch {
	case len(matches) == 0:
		return View{}, err
	case len(matches) > 1:
		var ids []sandbox.ID
		for _, v := range matches {
			ids = append(ids, v.ID)
		}
		return View{}, fault.BadField("sandbox_id", "%q is the beginning of %d ids: %s", idOrPrefix, len(matches), someIDs(ids))
	}
	return matches[0], nil
}

// Wait implements Sandboxes. Without states it waits until the sandbox does
// not run, and is not about to.
func (m *Manager) Wait(ctx context.Context, id sandbox.ID, states ...sandbox.State) (View, error) {
	if len(states) == 0 {
		states = []sandbox.State{sandbox.Stopped, sandbox.Failed, sandbox.Broken, sandbox.Hibernated}
	}
	b, err := m.find(id)
	if err != nil {
		return View{}, err
	}
	for {
		p := b.pub.Load()
		if p.rec.State == sandbox.Gone || slices.Contains(states, p.rec.State) {
			v := b.view()
			v.Record = p.rec
			return v, nil
		}
		if err := b.await(ctx, p); err != nil && !fault.Is(err, fault.NotFound) {
			return View{}, err
		}
	}
}

// Quarantined returns the sandboxes whose records can't be read.
func (m *Manager) Quarantined() []store.Quarantined {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []store.Quarantined
	for _, q := range m.quarantined {
		all = append(all, q)
	}
	slices.SortFunc(all, func(a, b store.Quarantined) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// ImagesInUse returns the digests of the images that sandboxes and snapshots
// need. all is false when there may be more: a sandbox in quarantine may not
// tell its own.
func (m *Manager) ImagesInUse() (digests map[string]bool, all bool) {
	return m.inUse(func(c store.Claims) string { return c.ImageDigest })
}

// KernelsInUse returns the ids of the kernel packs that sandboxes and snapshots
// need. all is as with ImagesInUse.
func (m *Manager) KernelsInUse() (ids map[string]bool, all bool) {
	return m.inUse(func(c store.Claims) string { return c.KernelID })
}

// inUse marks by the records what sandboxes and named snapshots need.
func (m *Manager) inUse(part func(store.Claims) string) (marked map[string]bool, all bool) {
	marked, all = map[string]bool{}, true
	for _, v := range m.views() {
		marked[part(store.Claims{ImageDigest: v.ImageDigest, KernelID: v.KernelID})] = true
	}
	for _, s := range m.stock.list() {
		if s.snap.Kind == snapshot.Named {
			marked[part(store.Claims{ImageDigest: s.snap.ImageDigest, KernelID: s.snap.Fits.KernelID})] = true
		}
	}
	for _, q := range m.Quarantined() {
		if q.Claims == nil || part(*q.Claims) == "" {
			all = false
			continue
		}
		marked[part(*q.Claims)] = true
	}
	return marked, all
}

// find returns a sandbox that is there.
func (m *Manager) find(id sandbox.ID) (*box, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.openLocked(); err != nil {
		return nil, err
	}
	if b := m.boxes[id]; b != nil {
		return b, nil
	}
	if q, ok := m.quarantined[id]; ok {
		return nil, quarantineErr(q)
	}
	return nil, notFound(string(id))
}

func quarantineErr(q store.Quarantined) error {
	return fault.New(fault.Precondition, "sandbox %s is in quarantine, its record in %s can't be read: %w", q.Name, q.Dir, q.Err)
}

// openLocked tells whether calls are served. m.mu is held.
func (m *Manager) openLocked() error {
	switch m.phase {
	case open:
		return nil
	case fresh, starting:
		return fault.New(fault.Unavailable, "hutchd is starting")
	case closed:
	}
	return stopping()
}

// forget takes a sandbox that is gone out of the list.
func (m *Manager) forget(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boxes[b.id] == b {
		delete(m.boxes, b.id)
	}
}

func (m *Manager) sandboxRunDir() string { return filepath.Join(m.p.RunDir, "sandboxes") }

// anyKernel returns the kernel pack if there is one, for calls that have to
// name one but do not boot.
func (m *Manager) anyKernel() kernel.Pack {
	k, err := m.p.Kernel()
	if err != nil {
		m.p.Log.Debug("no kernel pack", slog.Any("error", err))
	}
	return k
}
