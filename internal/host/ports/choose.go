package ports

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Wish is a port of the host whose number is left open.
type Wish struct {
	Protocol      string // "tcp" or "udp"
	HostIP        string // empty: every address
	First, Last   uint16 // the numbers that will do; 0: any
	ContainerPort uint16
}

// anyTries is how many free numbers are tried for a wish that takes any: one
// that is free on one address may be taken on another.
const anyTries = 32

// Choose picks a number of the host for each wish, and reserves all of them as
// Reserve does, or none: for a container that is about to be made, whose docker
// knows only what is free in its own machine. name is for people. When every
// number that will do is taken, the error holds the *TakenError of the last. Of
// what policy keeps closed the number is 0: that is docker's to choose.
//
// A Reserve of the same numbers by the container itself, in the same sandbox,
// takes the place of what is held here.
func (t *Table) Choose(_ context.Context, id sandbox.ID, name string, wishes []Wish) (numbers []uint16, release func(), err error) {
	numbers = make([]uint16, len(wishes))
	if t.p.Policy.Bind == None {
		return numbers, nothing, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	b, err := t.boxLocked(id)
	if err != nil {
		return nil, nil, err
	}
	t.order++
	o := Owner{ID: fmt.Sprintf("new-%d", t.order), Name: printable(name, maxName)}
	for i, w := range wishes {
		if numbers[i], err = b.chooseLocked(&o, w); err != nil {
			b.removeLocked(o.ID)
			return nil, nil, err
		}
	}
	made := b.owners[o.ID]
	if made == nil {
		return numbers, nothing, nil
	}
	return numbers, b.holdLocked(made), nil
}

// chooseLocked adds to o a binding as w wishes it, which is open then. The
// table's mu is held.
func (b *box) chooseLocked(o *Owner, w Wish) (uint16, error) {
	var last error
	others := slices.Clip(o.Bindings)
	for try := 0; ; try++ {
		n, more, err := b.t.candidate(w, try)
		if err != nil {
			return 0, err
		}
		if !more {
			break
		}
		want := Binding{Protocol: w.Protocol, HostIP: printable(w.HostIP, maxHostIP), HostPort: n, ContainerPort: w.ContainerPort}
		same := func(bd Binding) bool { return bd.Protocol == w.Protocol && bd.HostPort == n }
		if len(b.t.p.Policy.plan(want).addrs) == 0 || slices.ContainsFunc(others, same) {
			continue
		}
		o.Bindings = append(others, want)
		b.setLocked(*o)
		var taken *TakenError
		if last = b.whyNotLocked(o.ID, want); last == nil {
			return n, nil
		} else if !errors.As(last, &taken) {
			return 0, last
		}
	}
	o.Bindings = others
	b.setLocked(*o)
	if last != nil {
		return 0, fault.As(fault.Exists, last)
	}
	return 0, nil
}

// candidate returns the number to be tried for w after others, and whether
// there is one.
func (t *Table) candidate(w Wish, try int) (number uint16, more bool, err error) {
	if w.First != 0 {
		n := int(w.First) + try
		return uint16(n), n <= int(w.Last), nil
	}
	plan := t.p.Policy.plan(Binding{Protocol: w.Protocol, HostIP: w.HostIP, ContainerPort: w.ContainerPort})
	if len(plan.addrs) == 0 || try == anyTries {
		return 0, false, nil
	}
	n, err := freeNumber(w.Protocol, plan.addrs)
	return n, err == nil, err
}

// freeNumber returns a number that is free on one of the addresses.
func freeNumber(protocol string, addrs []netip.Addr) (uint16, error) {
	var l listener
	for _, a := range addrs {
		err := l.listen(key{protocol, netip.AddrPortFrom(a, 0)})
		if err == nil {
			l.free()
			return l.key.at.Port(), nil
		}
		if !isNoFamily(err) {
			return 0, fmt.Errorf("look for a free port of the host: %w", err)
		}
	}
	return 0, fault.New(fault.Precondition, "this host has none of the addresses %s", addrs)
}

// whyNotLocked returns why a binding of an owner is not open by itself. The
// table's mu is held.
func (b *box) whyNotLocked(owner string, want Binding) error {
	o := b.owners[owner]
	if o == nil {
		return errTooMany
	}
	for _, bd := range o.bindings {
		if bd.Binding == want {
			return bd.err
		}
	}
	return errTooMany
}

var errTooMany = fault.New(fault.Exhausted, "the sandbox publishes %d ports, the most allowed", MaxBindings)
