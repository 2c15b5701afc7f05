package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tearDown takes slot index away, all of it or any part of it that is there,
// and looks that it is gone. First the guest's side goes silent, then the
// flows of its address are forgotten, and only then is the address given up,
// so that nobody can meet the flows of the tenant before.
func (n *Network) tearDown(ctx context.Context, index int) error {
	silence := n.silence(index)
	if err := n.forgetFlows(index); err != nil {
		return errors.Join(silence, err)
	}
	if err := ctx.Err(); err != nil {
		return errors.Join(silence, err)
	}
	return errors.Join(silence, n.removeVeth(index), removeNamespace(n.path(index)), n.mark(index, defaultPolicy()), n.fail("teardown"))
}

// fail lets a test break a named point.
func (n *Network) fail(name string) error {
	if n.after == nil {
		return nil
	}
	return n.after(name)
}

// silence takes the way to the host down from inside, so that no packet of
// the guest arrives any more while the address is still held. The tap goes
// with its namespace.
func (n *Network) silence(index int) error {
	err := n.inside(index, func() error {
		return withRoutes(func(h *netlink.Handle) error {
			return setDown(h, uplinkName)
		})
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil // no namespace: nothing to silence
	}
	return err
}

func setDown(h *netlink.Handle, name string) error {
	link, err := linkByName(h, name)
	if err != nil || link == nil {
		return err
	}
	if err := h.LinkSetDown(link); err != nil && !gone(err) {
		return fmt.Errorf("bring down %s: %w", name, err)
	}
	return nil
}

// forgetFlows removes the connections of slot index from the host's table,
// unless its address is another root's by now.
func (n *Network) forgetFlows(index int) error {
	ip := hostIPOf(index)
	return n.host.do(func() error {
		mine := true
		err := withRoutes(func(h *netlink.Handle) error {
			owner, err := routeOwner(h, ip)
			if err != nil || owner == 0 {
				return err
			}
			link, err := linkByName(h, n.names.slot(index))
			mine = link != nil && link.Attrs().Index == owner
			return err
		})
		if err != nil || !mine {
			return err
		}
		return forgetFlowsOf(ip)
	})
}

// ofAddr matches the flows that an address is part of, before or after
// translation.
type ofAddr struct{ ip netip.Addr }

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f ofAddr) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	for _, ip := range [][]byte{flow.Forward.SrcIP, flow.Forward.DstIP, flow.Reverse.SrcIP, flow.Reverse.DstIP} {
		if a, ok := netip.AddrFromSlice(ip); ok && a.Unmap() == f.ip {
			return true
		}
	}
	return false
}

// forgetFlowsOf removes the flows of ip from the table of the namespace that
// the thread is in, and looks that none is left.
func forgetFlowsOf(ip netip.Addr) error {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open connection table: %w", err)
	}
	defer h.Close()
	const tries = 20 // others change the table meanwhile, and interrupt the listing
	for range tries {
		var left uint
		left, err = h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, ofAddr{ip})
		if err == nil && left == 0 {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("forget flows of %s: %w", ip, err)
	}
	return fmt.Errorf("forget flows of %s: new ones keep coming", ip)
}
