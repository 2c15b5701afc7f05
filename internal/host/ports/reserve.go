package ports

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// reservedFor is how long a reservation waits for the guest to tell of its
// owner.
const reservedFor = 2 * time.Minute

// Reserve opens what a container is about to publish, before it starts, so that
// it need not start when a port of the host is taken: then the error holds a
// *TakenError, and nothing is reserved. What policy keeps closed is no error,
// and neither is a port that another owner in the same sandbox has: that is for
// the sandbox's own docker to refuse. Bindings without a HostPort are left out.
//
// When the guest tells of the owner, what it tells counts. Until then release
// takes the reservation back; so does time, after 2 minutes.
func (t *Table) Reserve(_ context.Context, id sandbox.ID, owner, name string, bindings []Binding) (release func(), err error) {
	if t.p.Policy.Bind == None {
		return nothing, nil
	}
	o, ok := clean(Owner{ID: owner, Name: name, Bindings: slices.Clone(bindings)})
	if !ok {
		return nil, fault.BadField("owner", "%q is no owner of ports", printable(owner, maxName))
	}
	o.Bindings = slices.DeleteFunc(o.Bindings, func(b Binding) bool { return b.HostPort == 0 })
	t.mu.Lock()
	defer t.mu.Unlock()
	b, err := t.boxLocked(id)
	if err != nil {
		return nil, err
	}
	if old := b.owners[o.ID]; old != nil && old.expire == nil {
		return nothing, nil // it runs: starting it does nothing
	}
	b.setLocked(o)
	made := b.owners[o.ID]
	if made == nil {
		return nothing, nil
	}
	if err := made.refusedLocked(); err != nil {
		b.removeLocked(o.ID)
		return nil, err
	}
	return b.holdLocked(made), nil
}

// nothing is how no reservation is released.
func nothing() {}

// boxLocked returns the box of a sandbox that is used. t.mu is held.
func (t *Table) boxLocked(id sandbox.ID) (*box, error) {
	if t.closed {
		return nil, fault.New(fault.Unavailable, "hutchd is stopping")
	}
	if b := t.boxes[id]; b != nil {
		return b, nil
	}
	return t.addLocked(id), nil // its state was not told yet
}

// holdLocked makes o a reservation. The table's mu is held.
func (b *box) holdLocked(o *owner) (release func()) {
	o.expire = time.AfterFunc(reservedFor, func() { b.release(o) })
	b.hurry() // a runtime is there
	return func() { b.release(o) }
}

// refusedLocked returns why the host does not let o have its ports. The table's
// mu is held.
func (o *owner) refusedLocked() error {
	for _, bd := range o.bindings {
		var taken *TakenError
		switch {
		case bd.err == nil:
		case !errors.As(bd.err, &taken):
			return bd.err
		case !o.box.holdsLocked(bd):
			return fault.As(fault.Exists, taken)
		}
	}
	return nil
}

// holdsLocked reports whether another owner of the sandbox has bd's number: the
// system can't tell it from somebody else's when the addresses differ. The
// table's mu is held.
func (b *box) holdsLocked(bd *binding) bool {
	for k, l := range b.t.held {
		if l.box == b && l.by.owner != bd.owner && k.number() == (number{bd.Protocol, bd.port}) {
			return true
		}
	}
	return false
}

// release takes a reservation back that the guest has not confirmed.
func (b *box) release(o *owner) {
	b.t.mu.Lock()
	defer b.t.mu.Unlock()
	if b.owners[o.id] == o && o.expire != nil && !b.t.closed {
		b.removeLocked(o.id)
	}
}
