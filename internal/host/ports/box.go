package ports

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// Bounds of what a guest may say of an owner, in bytes.
const (
	maxOwnerID = 400 // a Service's is at most 9 + 63 + 253
	maxName    = 128
	maxHostIP  = 64
)

// box is one sandbox in the table. Its fields are guarded by the table's mu,
// but for those that say otherwise.
type box struct {
	t   *Table
	id  sandbox.ID
	ctx context.Context // ends when the sandbox is gone, or the table closed
	end context.CancelFunc

	kick  chan struct{} // the sandbox runs: follow it
	haste chan struct{} // at once

	over     bool
	owners   map[string]*owner
	bindings int
	told     bool   // that there are too many
	round    uint64 // streams so far
	kept     map[keptKey]uint16

	unsaved bool
	savedAt time.Time
	saving  *time.Timer // nil: none
	save1   sync.Mutex  // one save at a time; taken before the table's mu

	conns atomic.Int32

	flowsMu sync.Mutex
	flows   map[*flow]struct{} // guarded by flowsMu
}

// owner is one owner in a sandbox.
type owner struct {
	box      *box
	id, name string
	bindings []*binding
	round    uint64      // of the stream that told of it last; 0: none did
	expire   *time.Timer // of a reservation; nil: the guest told of it
}

// binding is one port of an owner, and what is open of it.
type binding struct {
	Binding
	plan
	owner *owner
	order uint64
	port  uint16 // of the host; 0: not chosen yet
	open  []*listener
	// shared are addresses that another binding of the same owner, to the same
	// port of the guest, has open.
	shared []*listener
	err    error // why not all of it is open
}

func newBox(t *Table, id sandbox.ID) *box {
	b := &box{
		t: t, id: id, kick: make(chan struct{}, 1), haste: make(chan struct{}, 1),
		owners: map[string]*owner{}, kept: map[keptKey]uint16{}, flows: map[*flow]struct{}{},
	}
	b.ctx, b.end = context.WithCancel(t.life)
	return b
}

// wake has the sandbox followed, which runs.
func (b *box) wake() { signal(b.kick) }

// hurry is wake without waiting for the sandbox to settle.
func (b *box) hurry() {
	signal(b.haste)
	signal(b.kick)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it was told already
	}
}

// clean makes an owner of what a guest said, or reports that nothing can be
// made of it.
func clean(o Owner) (Owner, bool) {
	if o.ID == "" || len(o.ID) > maxOwnerID || o.ID != printable(o.ID, maxOwnerID) {
		return o, false
	}
	o.Name = printable(o.Name, maxName)
	seen := map[Binding]bool{}
	var out []Binding
	for _, b := range o.Bindings {
		b.HostIP = printable(b.HostIP, maxHostIP)
		if (b.Protocol != "tcp" && b.Protocol != "udp") || b.ContainerPort == 0 || seen[b] {
			continue
		}
		seen[b] = true
		if out = append(out, b); len(out) == MaxBindings {
			break
		}
	}
	o.Bindings = out
	return o, true
}

// printable makes a guest's words fit to be shown.
func printable(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '.'
		}
		return r
	}, s)
}

// setLocked makes o's bindings all that it has: what stays the same stays open,
// what is new is opened, and the rest is closed. It returns how many bindings
// are new. o is clean. The table's mu is held.
func (b *box) setLocked(o Owner) (fresh int) {
	b.yieldLocked(o)
	old := b.owners[o.ID]
	next := &owner{box: b, id: o.ID, name: o.Name}
	before := map[Binding]*binding{}
	if old != nil {
		next.round = old.round
		old.stop()
		for _, bd := range old.bindings {
			before[bd.Binding] = bd
		}
		b.bindings -= len(old.bindings)
	}
	room := MaxBindings - b.bindings
	if len(o.Bindings) > room {
		o.Bindings = o.Bindings[:room]
		b.tellTooMany(o.ID)
	}
	var opening []*binding
	for _, want := range o.Bindings {
		bd := before[want]
		if bd == nil {
			bd = b.newBindingLocked(next, want)
			opening = append(opening, bd)
		}
		delete(before, want)
		bd.owner = next
		next.bindings = append(next.bindings, bd)
	}
	b.bindings += len(next.bindings)
	delete(b.owners, o.ID)
	if len(next.bindings) > 0 {
		b.owners[o.ID] = next
	}
	b.t.exchangeLocked(before, opening)
	if old == nil || old.name != o.Name || len(opening) > 0 || len(before) > 0 {
		b.saveSoonLocked()
	}
	return len(opening)
}

// yieldLocked takes back reservations of other owners that are in o's way: a
// container that never published what was reserved for it has ended, or was
// refused by its docker. The table's mu is held.
func (b *box) yieldLocked(o Owner) {
	wanted := map[number]bool{}
	for _, bd := range o.Bindings {
		wanted[number{bd.Protocol, bd.HostPort}] = true
	}
	for id, other := range b.owners {
		inTheWay := func(bd *binding) bool { return wanted[number{bd.Protocol, bd.HostPort}] }
		if id != o.ID && other.expire != nil && slices.ContainsFunc(other.bindings, inTheWay) {
			b.removeLocked(id)
		}
	}
}

func (b *box) tellTooMany(owner string) {
	if !b.told {
		b.told = true
		b.t.p.Log.Warn("guest publishes too many ports, the rest is not opened",
			"sandbox_id", b.id, "owner", owner, "most", MaxBindings)
	}
}

func (b *box) newBindingLocked(o *owner, want Binding) *binding {
	b.t.order++
	bd := &binding{Binding: want, plan: b.t.p.Policy.plan(want), owner: o, order: b.t.order, port: want.HostPort}
	if want.HostPort == 0 {
		bd.port = b.kept[keptKeyOf(o.id, want)]
	}
	return bd
}

// removeLocked takes an owner away. The table's mu is held.
func (b *box) removeLocked(id string) {
	if o := b.owners[id]; o != nil {
		b.setLocked(Owner{ID: id, Name: o.name})
	}
}

// clearLocked takes all owners away. The table's mu is held.
func (b *box) clearLocked() {
	for id := range b.owners {
		b.removeLocked(id)
	}
}

// stop ends the waiting for the guest to confirm a reservation.
func (o *owner) stop() {
	if o.expire != nil {
		o.expire.Stop()
		o.expire = nil
	}
}

// stopTimersLocked ends what would happen later. Reservations stay what they
// are. The table's mu is held.
func (b *box) stopTimersLocked() {
	for _, o := range b.owners {
		if o.expire != nil {
			o.expire.Stop()
		}
	}
	if b.saving != nil {
		b.saving.Stop()
		b.saving = nil
	}
}
