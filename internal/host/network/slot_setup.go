package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/undo"
)

// errForeign says that another root on this host has the address.
var errForeign = errors.New("address is held by another hutch on this host")

// routeProtocol marks the routes of hutch: a number that no routing daemon
// uses, see /etc/iproute2/rt_protos.
const routeProtocol = 104

// step is one named part of building a slot.
type step struct {
	name string
	do   func(context.Context) error
	undo undo.Func // nil: undone by that of an earlier step
}

// steps build slot index for policy p. The route is the claim on the address:
// the kernel gives it to one root only.
func (n *Network) steps(index int, p policy) []step {
	return []step{
		{"namespace", func(context.Context) error { return n.makeInside(index) },
			func(context.Context) error { return removeNamespace(n.path(index)) }},
		{"veth", func(context.Context) error { return n.makeVeth(index) },
			func(context.Context) error { return n.removeVeth(index) }},
		{"claim", func(context.Context) error { return n.claim(index) }, nil},
		{"inside", func(context.Context) error { return n.connectInside(index) }, nil},
		{"rules", func(context.Context) error { return n.loadInside(index, p, newTable) }, nil},
		{"policy", func(context.Context) error { return n.mark(index, p) },
			func(context.Context) error { return n.mark(index, defaultPolicy()) }},
	}
}

// build makes slot index. On error nothing is left, unless broken is set.
func (n *Network) build(ctx context.Context, index int, p policy) (broken bool, err error) {
	var done undo.Stack
	for _, s := range n.steps(index, p) {
		err := ctx.Err()
		if s.undo != nil {
			done.Add(s.name, s.undo) // before the step: one that fails half-way leaves its half
		}
		if err == nil {
			err = s.do(ctx)
		}
		if err == nil && n.after != nil {
			err = n.after(s.name)
		}
		if err != nil {
			err = fmt.Errorf("set up network slot %d: %s: %w", index, s.name, err)
			undone := done.Run(ctx)
			return undone != nil, errors.Join(err, undone)
		}
	}
	done.Release()
	return false, nil
}

func (n *Network) path(index int) string { return filepath.Join(n.dir, n.names.slot(index)) }

// setting is one line of /proc/sys/net.
type setting struct {
	path, value string
	optional    bool // not every kernel has it
}

// insideSettings are those of a slot's namespace. They are written before it
// has interfaces, so that these start with them.
func insideSettings() []setting {
	out := []setting{
		{"ipv6/conf/all/disable_ipv6", "1", true},
		{"ipv6/conf/default/disable_ipv6", "1", true},
		{"ipv4/ip_forward", "1", false},
		{"netfilter/nf_conntrack_tcp_timeout_time_wait", "30", true},
		{"netfilter/nf_conntrack_tcp_timeout_syn_sent", "30", true},
		{"netfilter/nf_conntrack_tcp_timeout_established", "86400", true},
	}
	for _, dev := range []string{"all", "default"} {
		for _, s := range []setting{
			{"rp_filter", "0", false}, // our rules know the one right source
			{"accept_redirects", "0", false},
			{"send_redirects", "0", false},
			{"accept_source_route", "0", false},
			{"log_martians", "0", false}, // a guest must not write the host's log
			{"route_localnet", "0", false},
			{"proxy_arp", "0", false},
			{"arp_ignore", "1", false}, // or the guest learns its host_ip
		} {
			out = append(out, setting{"ipv4/conf/" + dev + "/" + s.path, s.value, s.optional})
		}
	}
	return out
}

// apply writes settings for the namespace that the thread is in.
func apply(settings []setting) error {
	for _, s := range settings {
		err := os.WriteFile(filepath.Join("/proc/sys/net", s.path), []byte(s.value), 0)
		if s.optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("set kernel setting: %w", err)
		}
	}
	return nil
}

func (n *Network) makeInside(index int) error {
	return makeNamespace(n.path(index), func() error {
		if err := apply(insideSettings()); err != nil {
			return err
		}
		return makeTap()
	})
}

// withRoutes runs fn with a netlink connection to the namespace that the
// thread is in.
func withRoutes(fn func(*netlink.Handle) error) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	return fn(h)
}

// onHost runs fn in the host's namespace.
func (n *Network) onHost(fn func(*netlink.Handle) error) error {
	return n.host.do(func() error { return withRoutes(fn) })
}

// inside runs fn in the namespace of slot index.
func (n *Network) inside(index int, fn func() error) error {
	ns, err := openNamespace(n.path(index))
	if err != nil {
		return err
	}
	return errors.Join(ns.do(fn), ns.close())
}

func (n *Network) makeVeth(index int) error {
	ns, err := openNamespace(n.path(index))
	if err != nil {
		return err
	}
	defer ns.close()
	return n.onHost(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.HardwareAddr = n.names.slot(index), MTU, mac(vethMAC)
		attrs.NumTxQueues, attrs.NumRxQueues = 1, 1 // not one for each of the host's CPUs
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerMTU, veth.PeerHardwareAddr = uplinkName, MTU, mac(uplinkMAC)
		veth.PeerNumTxQueues, veth.PeerNumRxQueues = 1, 1
		veth.PeerNamespace = netlink.NsFd(ns.file.Fd())
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("make veth %s: %w", attrs.Name, err)
		}
		return nil
	})
}

// linkByName is nil, with no error, when there is no such link.
func linkByName(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up link %s: %w", name, err)
	}
	return link, nil
}

func (n *Network) removeVeth(index int) error {
	return n.onHost(func(h *netlink.Handle) error { return removeLink(h, n.names.slot(index)) })
}

// removeLink takes a link away and looks that it is gone.
func removeLink(h *netlink.Handle, name string) error {
	link, err := linkByName(h, name)
	if err != nil || link == nil {
		return err
	}
	if err := h.LinkDel(link); err != nil && !gone(err) {
		return fmt.Errorf("remove link %s: %w", name, err)
	}
	if link, err = linkByName(h, name); err != nil {
		return err
	}
	if link != nil {
		return fmt.Errorf("remove link %s: it is still there", name)
	}
	return nil
}

func host32(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
}

// claim brings the host's end up and routes the slot's address to it. It may
// be repeated for a slot that stands.
func (n *Network) claim(index int) error {
	name := n.names.slot(index)
	return n.onHost(func(h *netlink.Handle) error {
		link, err := linkByName(h, name)
		if err != nil {
			return err
		}
		if link == nil {
			return fmt.Errorf("link %s is gone: %w", name, os.ErrNotExist)
		}
		// Without this the kernel would make a link-local address and join groups.
		if err := h.LinkSetIP6AddrGenMode(link, nl6GenNone); err != nil && !withoutIPv6(err) {
			return fmt.Errorf("turn IPv6 addresses off on %s: %w", name, err)
		}
		if err := h.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s: %w", name, err)
		}
		if err := claimRoute(h, link, hostIPOf(index)); err != nil {
			return err // before anything that could meet the owner's
		}
		if err := h.AddrReplace(link, &netlink.Addr{IPNet: host32(vethIPOf(index))}); err != nil {
			return fmt.Errorf("set address of %s: %w", name, err)
		}
		// Permanent entries do not count against the neighbour table's limit of 1024.
		if err := h.NeighSet(neighbour(link, hostIPOf(index), uplinkMAC)); err != nil {
			return fmt.Errorf("set neighbour on %s: %w", name, err)
		}
		return nil
	})
}

// withoutIPv6 reports whether err comes of a kernel or a link without IPv6.
func withoutIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)
}

// nl6GenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const nl6GenNone = 1

func neighbour(link netlink.Link, ip netip.Addr, hw string) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: ip.AsSlice(), HardwareAddr: mac(hw)}
}

func claimRoute(h *netlink.Handle, link netlink.Link, ip netip.Addr) error {
	err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host32(ip), Scope: netlink.SCOPE_LINK, Protocol: routeProtocol})
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("route %s to %s: %w", ip, link.Attrs().Name, err)
	}
	owner, err := routeOwner(h, ip)
	if err != nil {
		return err
	}
	if owner == link.Attrs().Index {
		return nil
	}
	return fmt.Errorf("route %s to %s: %w", ip, link.Attrs().Name, errForeign)
}

// routeOwner is the index of the link that ip is routed to by a route of its
// own, 0 if there is none.
func routeOwner(h *netlink.Handle, ip netip.Addr) (int, error) {
	routes, err := h.RouteGetWithOptions(ip.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look up route to %s: %w", ip, err)
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() == host32(ip).String() {
			return r.LinkIndex, nil
		}
	}
	return 0, nil
}

// dump repeats a listing that a change interrupted.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	const tries = 20
	var out []T
	var err error
	for range tries {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, err
}

// connectInside gives the slot's own interfaces their addresses and routes.
func (n *Network) connectInside(index int) error {
	return n.inside(index, func() error {
		return withRoutes(func(h *netlink.Handle) error {
			tap, err := h.LinkByName(tapName)
			if err != nil {
				return fmt.Errorf("look up %s: %w", tapName, err)
			}
			uplink, err := h.LinkByName(uplinkName)
			if err != nil {
				return fmt.Errorf("look up %s: %w", uplinkName, err)
			}
			gateway := netip.MustParsePrefix(GuestAddr)
			net30 := &net.IPNet{IP: net.ParseIP(GatewayIP).To4(), Mask: net.CIDRMask(gateway.Bits(), 32)}
			return inOrder(
				named{"set address of tap", func() error { return h.LinkSetHardwareAddr(tap, mac(TapMAC)) }},
				named{"set MTU of tap", func() error { return h.LinkSetMTU(tap, MTU) }},
				named{"set IP address of tap", func() error { return h.AddrAdd(tap, &netlink.Addr{IPNet: net30}) }},
				named{"bring up tap", func() error { return h.LinkSetUp(tap) }},
				named{"set guest's hardware address", func() error { return h.NeighSet(neighbour(tap, netip.MustParseAddr(guestIP), GuestMAC)) }},
				named{"set IP address of uplink", func() error { return h.AddrAdd(uplink, &netlink.Addr{IPNet: host32(hostIPOf(index))}) }},
				named{"bring up uplink", func() error { return h.LinkSetUp(uplink) }},
				named{"set host's hardware address", func() error { return h.NeighSet(neighbour(uplink, vethIPOf(index), vethMAC)) }},
				named{"add default route", func() error {
					return h.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: vethIPOf(index).AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
				}},
			)
		})
	})
}

type named struct {
	name string
	do   func() error
}

// inOrder runs calls until one fails.
func inOrder(calls ...named) error {
	for _, c := range calls {
		if err := c.do(); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

func (n *Network) slotRules(index int, p policy) slotRules {
	return slotRules{hostIP: hostIPOf(index), resolvers: n.resolvers, policy: p, limits: defaultLimits()}
}

// loadInside loads the rules of the slot.
func (n *Network) loadInside(index int, p policy, open opener) error {
	return n.inside(index, func() error {
		return withNft(func(c *nftables.Conn) error { return n.slotRules(index, p).load(c, open) })
	})
}
