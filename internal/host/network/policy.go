package network

import (
	"net/netip"
	"slices"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// MaxAllow is the largest number of prefixes that a policy may list.
const MaxAllow = 256

// span is a range of IPv4 addresses, both ends included.
type span struct {
	lo, hi uint32
}

// policy is a sandbox.Policy made ready for the kernel.
type policy struct {
	mode sandbox.Mode
	open []span // sorted, apart from each other
}

// plain reports whether p is what a prepared slot has already.
func (p policy) plain() bool { return p.mode == sandbox.ModeInternet && len(p.open) == 0 }

func defaultPolicy() policy { return policy{mode: sandbox.ModeInternet} }

// parsePolicy checks p. Its errors name the field.
func parsePolicy(p sandbox.Policy) (policy, error) {
	out := policy{mode: p.Mode}
	switch p.Mode {
	case "":
		out.mode = sandbox.ModeInternet
	case sandbox.ModeInternet, sandbox.ModeNone, sandbox.ModeAllow:
	default:
		return policy{}, fault.BadField("network.mode", "%q is none of internet, none, allow", p.Mode)
	}
	if len(p.Allow) > MaxAllow {
		return policy{}, fault.BadField("network.allow", "%d prefixes are listed, at most %d can be", len(p.Allow), MaxAllow)
	}
	var spans []span
	for _, text := range p.Allow {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return policy{}, fault.BadField("network.allow", "%q is no prefix like 192.0.2.0/24 or 192.0.2.1/32", text)
		}
		if !prefix.Addr().Is4() {
			return policy{}, fault.BadField("network.allow", "%q is no IPv4 prefix; sandboxes have no IPv6", text)
		}
		spans = append(spans, spanOf(prefix))
	}
	out.open = merge(spans)
	return out, nil
}

func valueOf(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func spanOf(p netip.Prefix) span {
	lo := valueOf(p.Masked().Addr())
	return span{lo, lo | uint32(uint64(1)<<(32-p.Bits())-1)}
}

// merge sorts spans and joins the ones that overlap or touch: the kernel's
// interval sets refuse overlaps.
func merge(spans []span) []span {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b span) int {
		if a.lo != b.lo {
			return int(int64(a.lo) - int64(b.lo))
		}
		return int(int64(a.hi) - int64(b.hi))
	})
	var out []span
	for _, s := range spans {
		if n := len(out); n > 0 && uint64(s.lo) <= uint64(out[n-1].hi)+1 {
			out[n-1].hi = max(out[n-1].hi, s.hi)
			continue
		}
		out = append(out, s)
	}
	return out
}

func spansOf(prefixes ...string) []span {
	var out []span
	for _, p := range prefixes {
		out = append(out, spanOf(netip.MustParsePrefix(p)))
	}
	return merge(out)
}

// refusedSpans are the addresses that are not the public internet.
func refusedSpans() []span {
	return spansOf(
		"0.0.0.0/8",      // this network
		"10.0.0.0/8",     // private
		"100.64.0.0/10",  // carriers' own
		"127.0.0.0/8",    // loopback
		"169.254.0.0/16", // link-local, the metadata address in it
		"172.16.0.0/12",  // private
		"192.0.0.0/24",   // protocol assignments
		"192.168.0.0/16", // private
		"198.18.0.0/15",  // hutch itself
		"224.0.0.0/4",    // multicast
		"240.0.0.0/4",    // reserved, the broadcast address in it
	)
}

// martianSpans are the refused addresses that the kernel would drop without a
// word before any filter sees them.
func martianSpans() []span { return spansOf("0.0.0.0/8", "127.0.0.0/8") }

// hutchSpans are the addresses of all slots.
func hutchSpans() []span { return spansOf("198.18.0.0/15") }
