package network

import (
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// limits are what one sandbox may have of the connection table that all share
// with the host.
type limits struct {
	flows uint32 // at a time
	rate  uint64 // new ones, a second
	burst uint32 // new ones, at once
}

// defaultLimits are more than a busy crawler or build needs, and few enough
// that dozens of hostile sandboxes cannot fill the host's table.
func defaultLimits() limits { return limits{flows: 8192, rate: 500, burst: 2000} }

const slotTable = "hutch"

// slotRules is what a slot's own tables depend on.
type slotRules struct {
	hostIP    netip.Addr
	resolvers []netip.Addr
	policy    policy
	limits    limits
}

// dnsAddrs are the addresses that a guest asks for names, one for each of at
// most three resolvers. The first is its gateway; all lead there.
func dnsAddrs() []netip.Addr {
	return []netip.Addr{
		netip.MustParseAddr(GatewayIP),
		netip.MustParseAddr("198.18.0.53"),
		netip.MustParseAddr("198.18.0.54"),
	}
}

// source is the table that looks at every frame of the guest before anything
// else does: IPv4 and ARP from its own addresses, nothing more. It is what
// keeps the host's neighbour table out of the guest's reach.
func (s slotRules) source(r *rules) {
	guest := netip.MustParseAddr(guestIP)
	in := r.base(base{name: "source", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookIngress, drop: true, device: tapName})
	r.add(in, payload(linkHeader, atEtherSource, neq, mac(GuestMAC)), drop())
	r.add(in, etherType(unix.ETH_P_IP), payload(netHeader, atIPSource, eq, guest.AsSlice()), accept())
	r.add(in, etherType(unix.ETH_P_ARP), payload(netHeader, atARPSenderMAC, eq, mac(GuestMAC)),
		payload(netHeader, atARPSenderIP, eq, guest.AsSlice()), accept())
}

// opener is newTable or replaceTable.
type opener func(*nftables.Conn, nftables.TableFamily, string) *rules

// load loads all tables of the slot in one transaction. Replacing is much
// slower than making new: the kernel waits until nobody uses the old ones.
func (s slotRules) load(c *nftables.Conn, open opener) error {
	s.source(open(c, nftables.TableFamilyNetdev, slotTable))
	return s.loadPolicy(c, open)
}

// loadPolicy loads the table of translation and policy.
func (s slotRules) loadPolicy(c *nftables.Conn, open opener) error {
	r := open(c, nftables.TableFamilyINet, slotTable)
	refuse := r.refuseChain()
	s.guard(r, refuse)
	s.nat(r)
	s.local(r, refuse)
	s.forward(r, refuse)
	return r.flush()
}

// guard drops what has no business here, before connections are tracked.
func (s slotRules) guard(r *rules, refuse *nftables.Chain) {
	martian := r.set(spanSet("martian"), spanElements(martianSpans()))
	c := r.base(base{name: "guard", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, prio: priorityRaw})
	r.add(c, isIPv6(), drop())
	r.add(c, fromLink(uplinkName), notTo(s.hostIP), drop())
	r.add(c, fromLink(tapName), notFrom(netip.MustParseAddr(guestIP)), drop())
	r.add(c, fromLink(tapName), toSet(martian), pass(refuse))
}

// nat makes the one guest address into the slot's own and back.
func (s slotRules) nat(r *rules) {
	pre := r.base(base{name: "prerouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, prio: priorityDestNAT})
	r.add(pre, fromLink(uplinkName), to(s.hostIP), changeDest(netip.MustParseAddr(guestIP)))
	if s.policy.mode != sandbox.ModeNone {
		for i, resolver := range s.resolvers {
			for _, p := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
				r.add(pre, fromLink(tapName), to(dnsAddrs()[i]), proto(p), toPort(dnsPort), changeDest(resolver))
			}
		}
	}
	post := r.base(base{name: "postrouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: prioritySourceNAT})
	r.add(post, toLink(uplinkName), changeSource(s.hostIP))
	r.add(post, toLink(tapName), changeSource(netip.MustParseAddr(GatewayIP)))
}

// local is about packets to and from the namespace itself. Nothing listens in
// it; a VMM that turned hostile finds that it cannot send either.
func (s slotRules) local(r *rules, refuse *nftables.Chain) {
	in := r.base(base{name: "input", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, prio: priorityFilter, drop: true})
	r.add(in, fromLink(tapName), pass(refuse))

	const destUnreachable, timeExceeded = 3, 11
	out := r.base(base{name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, prio: priorityFilter, drop: true})
	r.add(out, icmpType(destUnreachable), accept())
	r.add(out, icmpType(timeExceeded), accept())
	r.add(out, toLink(tapName), tcpFlags(0x04, 0x04), accept()) // resets, of refuse
}

// forward is the policy.
func (s slotRules) forward(r *rules, refuse *nftables.Chain) {
	hutch := r.set(spanSet("hutch"), spanElements(hutchSpans()))
	open := r.set(spanSet("open"), spanElements(s.policy.open))
	refused := r.set(spanSet("refused"), spanElements(refusedSpans()))

	permit := r.chain("permit")
	r.add(permit, faster(s.limits.rate, s.limits.burst), drop())
	r.add(permit, moreFlowsThan(s.limits.flows), pass(refuse))
	r.add(permit, accept())

	c := r.base(base{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: priorityFilter, drop: true})
	r.add(c, known(), accept())
	r.add(c, invalid(), drop())
	r.add(c, fromLink(uplinkName), toLink(tapName), translated(), accept())
	r.add(c, fromLink(uplinkName), drop())
	r.add(c, translated(), pass(permit)) // names, to a resolver of the host
	r.add(c, toSet(hutch), pass(refuse))
	r.add(c, toSet(open), pass(permit))
	if s.policy.mode != sandbox.ModeInternet {
		r.add(c, pass(refuse))
		return
	}
	r.add(c, toSet(refused), pass(refuse))
	r.add(c, pass(permit))
}
