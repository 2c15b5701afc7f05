package identity

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netlinkLinks is the network of the namespace of the thread that calls it
// first. It keeps its socket: a copy of the guest has no need to make one.
type netlinkLinks struct{ socket socket }

// NetlinkLinks returns the network of this machine. Changing it needs root.
func NetlinkLinks() Links { return &netlinkLinks{socket: -1} }

// Loopback implements Links.
func (n *netlinkLinks) Loopback() error {
	if err := n.socket.open(); err != nil {
		return err
	}
	return ioctls{n.socket, "lo"}.up()
}

// Apply implements Links. A machine without the interface is fine as long as
// it is to have no address.
func (n *netlinkLinks) Apply(p LinkParams) error {
	if err := n.socket.open(); err != nil {
		return err
	}
	s := ioctls{n.socket, p.Name}
	if done, err := s.fresh(p); done || err != nil {
		return err
	}
	if s.kept(p) {
		return nil
	}
	link, err := netlink.LinkByName(p.Name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) && !p.Address.IsValid() {
		return nil
	}
	if err != nil {
		return err
	}
	if p.MTU != 0 && link.Attrs().MTU != p.MTU {
		if err := netlink.LinkSetMTU(link, p.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", p.MTU, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	if err := setAddress(link, p.Address); err != nil {
		return err
	}
	if p.Gateway.IsValid() {
		if err := setGateway(link, p.Gateway); err != nil {
			return err
		}
	}
	return dropGateways(link, p.Gateway)
}

// list asks the kernel again when something changed while it told: a link that
// has just come up gets addresses of its own meanwhile. See NLM_F_DUMP_INTR in
// netlink(7).
func list[T any](ask func() ([]T, error)) (all []T, err error) {
	const tries = 20
	for range tries {
		if all, err = ask(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// setAddress leaves the link with want as its only address of a global scope.
func setAddress(link netlink.Link, want netip.Prefix) error {
	old, err := list(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	there := false
	for _, a := range old {
		if a.IP.IsLinkLocalUnicast() && a.IP.To4() == nil {
			continue // the kernel's own, every IPv6 link has one
		}
		if prefix, ok := prefixOf(a.IPNet); ok && prefix == want {
			there = true
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", a.IPNet, err)
		}
	}
	if there || !want.IsValid() {
		return nil
	}
	add := &netlink.Addr{IPNet: &net.IPNet{
		IP:   want.Addr().AsSlice(),
		Mask: net.CIDRMask(want.Bits(), want.Addr().BitLen()),
	}}
	if want.Addr().Is6() {
		add.Flags = unix.IFA_F_NODAD // nobody else is on this wire, and it must work at once
	}
	if err := netlink.AddrReplace(link, add); err != nil {
		return fmt.Errorf("add address %s: %w", want, err)
	}
	return nil
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), ok && bits != 0
}

func setGateway(link netlink.Link, gateway netip.Addr) error {
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if gateway.Is6() {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route by %s: %w", gateway, err)
	}
	return nil
}

// dropGateways removes the default routes of the link by any gateway but keep.
// IPv4 ones went with the address that they need; IPv6 ones stay behind.
func dropGateways(link netlink.Link, keep netip.Addr) error {
	routes, err := list(func() ([]netlink.Route, error) { return netlink.RouteList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		gateway, ok := netip.AddrFromSlice(r.Gw)
		if !ok || gateway.Unmap() == keep || r.Protocol == unix.RTPROT_RA || !isDefault(r.Dst) {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove default route by %s: %w", gateway, err)
		}
	}
	return nil
}

func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0
}
