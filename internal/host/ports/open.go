package ports

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// key is a port of the host.
type key struct {
	protocol string
	at       netip.AddrPort
}

// number is a key without its address: those of one number may be in each
// other's way.
type number struct {
	protocol string
	port     uint16
}

func (k key) number() number { return number{k.protocol, k.at.Port()} }

// exchangeLocked closes what is open of the dropped bindings and opens the
// others. A listener that both need, towards the same port of the same guest,
// changes hands without being closed. t.mu is held.
func (t *Table) exchangeLocked(dropped map[Binding]*binding, opening []*binding) {
	spare := map[key]*listener{}
	for _, bd := range dropped {
		delete(t.waiting, bd)
		for _, l := range bd.open {
			spare[l.key] = l
		}
		bd.open, bd.shared = nil, nil
	}
	freed := map[number]bool{}
	for k := range spare {
		freed[k.number()] = true
	}
	for _, bd := range opening {
		t.openLocked(bd, spare)
	}
	for _, l := range spare {
		t.closeLocked(l)
	}
	if len(freed) > 0 {
		t.retryLocked(func(bd *binding) bool { return freed[number{bd.Protocol, bd.port}] })
	}
}

// openLocked opens what is not open of bd. t.mu is held.
func (t *Table) openLocked(bd *binding, spare map[key]*listener) {
	bd.err, bd.shared = nil, nil
	var errs []error
	for _, a := range bd.addrs {
		if slices.ContainsFunc(bd.open, func(l *listener) bool { return l.key.at.Addr() == a }) {
			continue
		}
		switch l, err := t.takeLocked(bd, a, spare); {
		case err != nil:
			errs = append(errs, err)
		case l.by != bd:
			bd.shared = append(bd.shared, l)
		default:
			bd.open = append(bd.open, l)
		}
	}
	if bd.both && len(bd.open)+len(bd.shared) > 0 {
		errs = slices.DeleteFunc(errs, isNoFamily)
	}
	bd.err = errors.Join(errs...)
	if bd.err == nil && bd.shared == nil {
		delete(t.waiting, bd)
		return
	}
	t.waiting[bd] = struct{}{}
	if bd.err != nil {
		t.retryLaterLocked()
	}
}

// takeLocked returns a listener for bd on one address: a spare one, that of
// another binding of its owner, or a new one. t.mu is held.
func (t *Table) takeLocked(bd *binding, a netip.Addr, spare map[key]*listener) (*listener, error) {
	k := key{bd.Protocol, netip.AddrPortFrom(a, bd.port)}
	if l := spare[k]; l != nil && bd.port != 0 {
		delete(spare, k)
		if l.serves(bd) {
			l.by = bd
			return l, nil
		}
		t.closeLocked(l)
	}
	if l := t.held[k]; l != nil {
		if l.serves(bd) && l.by.owner == bd.owner {
			return l, nil
		}
		return nil, &TakenError{Binding: bd.Binding, Address: k.at, By: l.by.owner.describe()}
	}
	if len(t.held) >= t.p.MaxListeners {
		return nil, fault.New(fault.Exhausted, "hutchd holds %d listeners for sandboxes, the most allowed", len(t.held))
	}
	l, err := t.listenLocked(bd, k)
	if errors.Is(err, syscall.EADDRINUSE) && bd.HostPort == 0 && bd.port != 0 && len(bd.open) == 0 {
		bd.port = 0 // somebody has the number of before: another one will do
		return t.takeLocked(bd, a, spare)
	}
	if err != nil {
		return nil, err
	}
	if bd.port = l.key.at.Port(); bd.HostPort == 0 {
		bd.owner.box.keepLocked(bd)
	}
	return l, nil
}

// listenLocked opens a port of the host for bd. t.mu is held.
func (t *Table) listenLocked(bd *binding, k key) (*listener, error) {
	l := &listener{box: bd.owner.box, by: bd, guestPort: bd.guestPort(bd.owner.id)}
	if err := l.listen(k); err != nil {
		return nil, &TakenError{Binding: bd.Binding, Address: k.at, Err: rootCause(err)}
	}
	l.ctx, l.end = context.WithCancel(l.box.ctx)
	t.held[l.key] = l
	t.wg.Go(l.serve)
	return l, nil
}

// rootCause is what the system said, without our words of where.
func rootCause(err error) error {
	var no syscall.Errno
	if errors.As(err, &no) {
		return no
	}
	return err
}

// isNoFamily reports whether the host lacks the address's family.
func isNoFamily(err error) bool {
	return errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)
}

// listen opens k on the host.
func (l *listener) listen(k key) error {
	network := k.protocol + "4"
	if k.at.Addr().Is6() {
		network = k.protocol + "6" // of IPv6 only
	}
	var lc net.ListenConfig
	if k.protocol == "udp" {
		c, err := lc.ListenPacket(context.Background(), network, k.at.String())
		if err != nil {
			return err
		}
		l.udp = c.(*net.UDPConn)
		k.at = netip.AddrPortFrom(k.at.Addr(), uint16(c.LocalAddr().(*net.UDPAddr).Port))
	} else {
		c, err := lc.Listen(context.Background(), network, k.at.String())
		if err != nil {
			return err
		}
		l.tcp = c
		k.at = netip.AddrPortFrom(k.at.Addr(), uint16(c.Addr().(*net.TCPAddr).Port))
	}
	l.key = k
	return nil
}

// closeLocked closes a listener. Connections through it go on, flows end. t.mu
// is held.
func (t *Table) closeLocked(l *listener) {
	delete(t.held, l.key)
	l.close()
}

// retryLocked tries what waits and is chosen, those who asked first first. t.mu
// is held.
func (t *Table) retryLocked(chosen func(*binding) bool) {
	list := slices.SortedFunc(maps.Keys(t.waiting), func(a, b *binding) int { return cmp.Compare(a.order, b.order) })
	for _, bd := range list {
		if chosen(bd) {
			t.openLocked(bd, nil)
		}
	}
}

// retryLaterLocked has everything that waits tried again after a while. t.mu is
// held.
func (t *Table) retryLaterLocked() {
	if t.timer == nil && !t.closed {
		t.timer = time.AfterFunc(t.p.retryEvery, t.retryAll)
	}
}

func (t *Table) retryAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.timer = nil
	if !t.closed {
		t.retryLocked(func(*binding) bool { return true })
	}
}

// describe names an owner for people.
func (o *owner) describe() string {
	name := o.id
	if o.name != "" {
		name = o.name
	}
	return fmt.Sprintf("%s of sandbox %s", name, o.box.id)
}
