package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

func (n *Network) slot(index int) Slot {
	return Slot{Index: index, HostIP: hostIPOf(index), Netns: n.path(index)}
}

// Acquire implements Slots.
func (n *Network) Acquire(ctx context.Context, p sandbox.Policy) (Slot, error) {
	want, err := parsePolicy(p)
	if err != nil {
		return Slot{}, err
	}
	if err := ctx.Err(); err != nil {
		return Slot{}, err
	}
	if err := n.ensureHost(); err != nil {
		return Slot{}, err
	}
	if index, ok := n.ledger.nextPrepared(); ok {
		n.refill()
		return n.dress(ctx, index, want)
	}
	return n.acquireNew(ctx, want, taken)
}

// dress gives a prepared slot its policy.
func (n *Network) dress(ctx context.Context, index int, p policy) (Slot, error) {
	var err error
	if !p.plain() {
		err = n.setPolicy(index, p)
	}
	if err == nil {
		err = n.fail("dress")
	}
	if err == nil {
		n.ledger.end(index, taken)
		return n.slot(index), nil
	}
	ctx, cancel := undo.Detach(ctx)
	defer cancel()
	return Slot{}, errors.Join(fmt.Errorf("set policy of network slot %d: %w", index, err), n.finish(index, n.tearDown(ctx, index)))
}

func (n *Network) setPolicy(index int, p policy) error {
	err := n.inside(index, func() error {
		return withNft(func(c *nftables.Conn) error { return n.slotRules(index, p).loadPolicy(c, replaceTable) })
	})
	if err != nil {
		return err
	}
	return n.mark(index, p)
}

// SetPolicy implements Slots.
func (n *Network) SetPolicy(ctx context.Context, index int, p sandbox.Policy) error {
	want, err := parsePolicy(p)
	if err != nil {
		return err
	}
	was, err := n.ledger.begin(ctx, index)
	if err != nil {
		return err
	}
	if was == prepared {
		return fault.New(fault.Precondition, "network slot %d is not in use", index)
	}
	defer n.ledger.end(index, was)
	if was != taken {
		return fault.New(fault.Precondition, "network slot %d is not in use", index)
	}
	if err := n.setPolicy(index, want); err != nil {
		return fmt.Errorf("set policy of network slot %d: %w", index, err)
	}
	return nil
}

// acquireNew builds a slot on the next free index, which becomes as.
func (n *Network) acquireNew(ctx context.Context, p policy, as place) (Slot, error) {
	looked := false
	for {
		index, ok := n.ledger.next()
		if !ok {
			if looked {
				return Slot{}, fault.New(fault.Exhausted, "all %d network slots are in use", n.ledger.total)
			}
			looked = true
			if _, err := n.lookForOthers(); err != nil {
				return Slot{}, err
			}
			continue
		}
		broken, err := n.build(ctx, index, p)
		switch {
		case err == nil:
			n.ledger.end(index, as)
			return n.slot(index), nil
		case broken:
			n.ledger.end(index, setAside)
			return Slot{}, err
		case errors.Is(err, errForeign):
			n.ledger.end(index, foreign)
			if _, err := n.lookForOthers(); err != nil {
				return Slot{}, err
			}
		default:
			n.ledger.end(index, free)
			return Slot{}, err
		}
	}
}

// finish ends the removal of a busy slot.
func (n *Network) finish(index int, err error) error {
	if err == nil {
		n.ledger.end(index, free)
		return nil
	}
	n.ledger.end(index, setAside)
	return fmt.Errorf("remove network slot %d: %w", index, err)
}

// lookForOthers notes the addresses that other roots hold.
func (n *Network) lookForOthers() (freed bool, err error) {
	held := map[int]bool{}
	err = n.onHost(func(h *netlink.Handle) error {
		routes, err := dump(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		links, err := dump(h.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		mine := map[int]bool{}
		for _, l := range links {
			if _, ok := n.names.index(l.Attrs().Name); ok {
				mine[l.Attrs().Index] = true
			}
		}
		for _, r := range routes {
			if r.Dst == nil || mine[r.LinkIndex] {
				continue
			}
			if ones, bits := r.Dst.Mask.Size(); ones != bits {
				continue
			}
			a, _ := netip.AddrFromSlice(r.Dst.IP)
			if index, ok := indexOf(a.Unmap()); ok {
				held[index] = true
			}
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	return n.ledger.setForeign(held), nil
}

// OpenTap implements Slots.
func (n *Network) OpenTap(ctx context.Context, s Slot) (*os.File, error) {
	if err := n.mustHold(ctx, s.Index); err != nil {
		return nil, err
	}
	var tap *os.File
	err := n.inside(s.Index, func() (err error) {
		tap, err = openTap(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open tap of network slot %d: %w", s.Index, err)
	}
	return tap, nil
}

func (n *Network) mustHold(ctx context.Context, index int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !n.ledger.is(index, taken) {
		return fault.New(fault.Precondition, "network slot %d is not in use", index)
	}
	return nil
}

// Stats implements Slots.
func (n *Network) Stats(ctx context.Context, index int) (Stats, error) {
	if err := n.mustHold(ctx, index); err != nil {
		return Stats{}, err
	}
	var out Stats
	err := n.inside(index, func() (err error) {
		out, err = tapStats()
		return err
	})
	if err != nil {
		return Stats{}, fmt.Errorf("read counters of network slot %d: %w", index, err)
	}
	return out, nil
}

// Usage implements Slots. Slots that are set aside count as used.
func (n *Network) Usage() (used, total int) {
	return n.ledger.count(taken, setAside), n.ledger.total - n.ledger.count(foreign)
}

// Release implements Slots.
func (n *Network) Release(ctx context.Context, index int) error {
	if index < 1 || index > MaxSlots {
		return fault.New(fault.Invalid, "network slot %d does not exist", index)
	}
	was, err := n.ledger.begin(ctx, index)
	if err != nil {
		return err
	}
	switch was {
	case free, foreign:
		n.ledger.end(index, was)
		return nil
	case prepared: // it is no sandbox's
		return nil
	case busy, taken, setAside:
	}
	ctx, cancel := undo.Detach(ctx)
	defer cancel()
	return n.finish(index, n.tearDown(ctx, index))
}

// Adopt implements Slots. A slot of which a part is missing is a
// fault.NotFound, and is left as it is for Release or Reclaim.
func (n *Network) Adopt(ctx context.Context, index int, p sandbox.Policy) (Slot, error) {
	want, err := parsePolicy(p)
	if err != nil {
		return Slot{}, err
	}
	if index < 1 || index > n.ledger.total {
		return Slot{}, fault.New(fault.Invalid, "network slot %d does not exist", index)
	}
	if err := n.ensureHost(); err != nil {
		return Slot{}, err
	}
	was, err := n.ledger.begin(ctx, index)
	if err != nil {
		return Slot{}, err
	}
	if was == taken || was == prepared {
		if was == taken {
			n.ledger.end(index, taken)
		}
		return Slot{}, fault.New(fault.Exists, "network slot %d is in use already", index)
	}
	if err := n.adopt(index, want); err != nil {
		n.ledger.end(index, was)
		if gone(err) || errors.Is(err, errForeign) {
			err = fault.As(fault.NotFound, err)
		}
		return Slot{}, fmt.Errorf("adopt network slot %d: %w", index, err)
	}
	n.ledger.end(index, taken)
	return n.slot(index), nil
}

func (n *Network) adopt(index int, p policy) error {
	err := n.inside(index, func() error {
		return withRoutes(func(h *netlink.Handle) error {
			for _, name := range []string{tapName, uplinkName} {
				link, err := linkByName(h, name)
				if err != nil {
					return err
				}
				if link == nil {
					return fmt.Errorf("link %s in it is gone: %w", name, os.ErrNotExist)
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	if err := n.claim(index); err != nil {
		return err
	}
	if err := n.loadInside(index, p, replaceTable); err != nil {
		return err
	}
	return n.mark(index, p)
}

// found tells the indices of which anything is on the host.
func (n *Network) found() (map[int]bool, error) {
	out := map[int]bool{}
	entries, err := os.ReadDir(n.dir)
	if err != nil && !gone(err) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	for _, e := range entries {
		if index, ok := n.names.index(e.Name()); ok {
			out[index] = true
		}
	}
	err = n.onHost(func(h *netlink.Handle) error {
		links, err := dump(h.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			if index, ok := n.names.index(l.Attrs().Name); ok {
				out[index] = true
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	n.tableMu.Lock()
	defer n.tableMu.Unlock()
	for index := range n.policies {
		out[index] = true
	}
	return out, nil
}

// Reclaim implements Slots. Slots that this process has taken or prepared are
// in use, whatever live says.
func (n *Network) Reclaim(ctx context.Context, live []int) error {
	there, err := n.found()
	if err != nil {
		return err
	}
	for _, index := range live {
		delete(there, index)
	}
	var all sync.WaitGroup
	errs := make(chan error, len(there))
	turns := make(chan struct{}, reclaimAtOnce)
	for index := range there {
		turns <- struct{}{}
		all.Go(func() {
			errs <- n.reclaim(ctx, index)
			<-turns
		})
	}
	all.Wait()
	close(errs)
	var failed []error
	for err := range errs {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// reclaimAtOnce is how many slots are removed side by side: most of a removal
// is waiting for the kernel.
const reclaimAtOnce = 8

func (n *Network) reclaim(ctx context.Context, index int) error {
	was, err := n.ledger.begin(ctx, index)
	if err != nil {
		return err
	}
	switch was {
	case prepared:
		return nil
	case taken:
		n.ledger.end(index, taken)
		return nil
	case free, busy, setAside, foreign:
	}
	n.log.Info("removing network slot that nothing claims", "slot", index)
	return n.finish(index, n.tearDown(ctx, index))
}
