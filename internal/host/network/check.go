package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Level is how bad a finding is.
type Level string

// The levels.
const (
	OK      Level = "ok"
	Warn    Level = "warn"    // sandboxes run, but not all of it works
	Problem Level = "problem" // sandboxes cannot have a network
)

// Finding is the answer to one question about the host.
type Finding struct {
	Name   string // "tap", "namespace", "rules", "flows", "forwarding", "route", "firewall", "resolvers", "addresses"
	Level  Level
	Detail string // what is
	Advice string // what to do about it; empty if ok
}

// Check asks whether sandboxes can have a network on this host. It changes
// nothing but in a namespace of its own that is gone when it returns. Of p it
// uses Resolvers and HostNetns.
func Check(ctx context.Context, p Params) []Finding {
	if p.HostNetns == "" {
		p.HostNetns = ownNetns
	}
	out := tryOut(ctx)
	host, err := openNamespace(p.HostNetns)
	if err != nil {
		return append(out, Finding{"host", Problem, err.Error(), "give the path of the host's network namespace"})
	}
	defer host.close()
	err = host.do(func() error {
		out = append(out, checkForwarding(), checkRoute(), checkFirewall(), checkAddresses())
		return nil
	})
	if err != nil {
		out = append(out, Finding{"host", Problem, err.Error(), "run as root"})
	}
	return append(out, checkResolvers(p.Resolvers))
}

// tryOut builds the inside of a slot in a namespace that ends with the call.
func tryOut(ctx context.Context) []Finding {
	if err := ctx.Err(); err != nil {
		return []Finding{{"namespace", Problem, err.Error(), "try again"}}
	}
	var out []Finding
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if err := apply(insideSettings()); err != nil {
			return err
		}
		out = append(out, Finding{Name: "namespace", Level: OK, Detail: "a network namespace can be made"})
		tap, rules, flows := makeTap(), error(nil), error(nil)
		out = append(out, told("tap", tap, tunDevice+" makes taps", "load the tun module (modprobe tun); in a container, pass "+tunDevice+" through"))
		if tap == nil {
			s := slotRules{hostIP: hostIPOf(1), resolvers: dnsAddrs(), policy: defaultPolicy(), limits: defaultLimits()}
			rules = withNft(func(c *nftables.Conn) error { return s.load(c, newTable) })
			out = append(out, told("rules", rules, "nftables takes all rules", "use a kernel with nf_tables, nft_ct, nft_nat, nft_masq, nft_fib_inet, nft_reject_inet, nft_limit and nft_connlimit"))
		}
		flows = forgetFlowsOf(hostIPOf(1))
		out = append(out, told("flows", flows, "connections can be listed and removed", "load the nf_conntrack_netlink module"))
		return nil
	})
	if err != nil {
		out = append(out, Finding{"namespace", Problem, err.Error(), "run as root, with /proc/sys writable"})
	}
	return out
}

func told(name string, err error, fine, advice string) Finding {
	if err != nil {
		return Finding{name, Problem, err.Error(), advice}
	}
	return Finding{Name: name, Level: OK, Detail: fine}
}

func checkForwarding() Finding {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		return Finding{"forwarding", Problem, err.Error(), "mount /proc"}
	}
	if strings.TrimSpace(string(b)) == "1" {
		return Finding{Name: "forwarding", Level: OK, Detail: "the host forwards IPv4"}
	}
	return Finding{"forwarding", Warn, "the host does not forward IPv4; hutchd turns it on when it starts",
		"to turn it on yourself: sysctl -w net.ipv4.ip_forward=1"}
}

func checkRoute() Finding {
	owner := ""
	err := withRoutes(func(h *netlink.Handle) error {
		routes, err := h.RouteGet(netip.MustParseAddr("8.8.8.8").AsSlice())
		if err != nil || len(routes) == 0 {
			return err
		}
		link, err := h.LinkByIndex(routes[0].LinkIndex)
		if err == nil {
			owner = link.Attrs().Name
		}
		return err
	})
	if err != nil || owner == "" {
		return Finding{"route", Warn, "the host has no route to the internet, so sandboxes have none", "add a default route"}
	}
	return Finding{Name: "route", Level: OK, Detail: "the internet is behind " + owner}
}

// checkFirewall looks for chains of others that drop what ours let pass: a
// packet has to pass all chains at its hook, so nothing of ours can help.
func checkFirewall() Finding {
	advice := "let packets from and to interfaces hu-* pass there, with Docker for example: " +
		"iptables -I DOCKER-USER -i hu-+ -j ACCEPT; iptables -I DOCKER-USER -o hu-+ -j ACCEPT"
	var closed []string
	err := withNft(func(c *nftables.Conn) error {
		chains, err := c.ListChains()
		if err != nil {
			return fmt.Errorf("list nftables chains: %w", err)
		}
		for _, chain := range chains {
			if chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookForward || chain.Policy == nil || *chain.Policy != nftables.ChainPolicyDrop {
				continue
			}
			if f := chain.Table.Family; f == nftables.TableFamilyIPv4 || f == nftables.TableFamilyINet {
				closed = append(closed, chain.Table.Name+"/"+chain.Name)
			}
		}
		return nil
	})
	if err != nil {
		return Finding{"firewall", Problem, err.Error(), "run as root, on a kernel with nf_tables"}
	}
	if len(closed) > 0 {
		return Finding{"firewall", Warn, "forwarded packets are dropped by default in " + strings.Join(closed, ", "), advice}
	}
	legacy, err := os.ReadFile("/proc/net/ip_tables_names")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Finding{"firewall", Warn, err.Error(), "run as root"}
	}
	if strings.Contains(string(legacy), "filter") {
		return Finding{"firewall", Warn, "there are rules of the old iptables, which cannot be looked into from here",
			"look at the policy of FORWARD in iptables-legacy -S; if it is DROP, " + advice}
	}
	return Finding{Name: "firewall", Level: OK, Detail: "no firewall drops forwarded packets by default"}
}

// checkAddresses looks for others that use the addresses of the slots.
func checkAddresses() Finding {
	var others []string
	err := withRoutes(func(h *netlink.Handle) error {
		routes, err := dump(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil || !usesHutch(r.Dst.IP, r.Dst.Mask) {
				continue
			}
			link, err := h.LinkByIndex(r.LinkIndex)
			if err != nil || !strings.HasPrefix(link.Attrs().Name, anyPrefix) {
				others = append(others, r.Dst.String())
			}
		}
		return nil
	})
	if err != nil {
		return Finding{"addresses", Problem, err.Error(), "run as root"}
	}
	if len(others) > 0 {
		return Finding{"addresses", Warn, "somebody else uses addresses of 198.18.0.0/15: " + strings.Join(others, ", "),
			"move that network elsewhere; hutch needs 198.18.0.0/15"}
	}
	return Finding{Name: "addresses", Level: OK, Detail: "198.18.0.0/15 is free for hutch"}
}

// usesHutch reports whether a route is for a part of 198.18.0.0/15. Routes for
// more than that, as the default route, do not take anything away.
func usesHutch(ip, mask []byte) bool {
	a, ok := netip.AddrFromSlice(ip)
	ones := 0
	for _, b := range mask {
		for ; b != 0; b <<= 1 {
			ones++
		}
	}
	return ok && ones >= 15 && netip.MustParsePrefix("198.18.0.0/15").Contains(a.Unmap())
}

func checkResolvers(given []netip.Addr) Finding {
	const advice = "name resolvers in hutchd's configuration, by IPv4 addresses that are not loopback"
	resolvers, err := chooseResolvers(given)
	if err != nil {
		return Finding{"resolvers", Problem, err.Error(), advice}
	}
	if len(resolvers) == 0 {
		return Finding{"resolvers", Warn, "the host names no resolver that sandboxes could ask: none, or only such as listen on loopback or IPv6", advice}
	}
	var names []string
	for _, a := range resolvers {
		names = append(names, a.String())
	}
	return Finding{Name: "resolvers", Level: OK, Detail: "names are asked of " + strings.Join(names, ", ")}
}
