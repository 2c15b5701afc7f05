package ports

import (
	"fmt"
	"net/netip"
	"slices"
)

// Bind says on which addresses of the host guests may have ports opened.
type Bind string

// The answers.
const (
	// Loopback opens on loopback addresses only: also what asks for every
	// address.
	Loopback Bind = "loopback"
	// Any opens on the address that is asked for.
	Any Bind = "any"
	// None opens nothing.
	None Bind = "none"
)

// Binds lists the answers.
func Binds() []Bind { return []Bind{Loopback, Any, None} }

// Policy says what guests may have opened.
type Policy struct {
	Bind Bind
	// Privileged allows ports below 1024.
	Privileged bool
}

// firstUnprivileged is the first port that needs no Privileged.
const firstUnprivileged = 1024

// plan is where a binding is to be opened.
type plan struct {
	addrs []netip.Addr
	// note says what of the wish is not fulfilled by policy.
	note string
	// both says that addrs are those of IPv4 and IPv6 for one wish: a host
	// without one of them is no problem.
	both bool
}

// plan says where b is to be opened. The HostIP is a guest's words.
func (p Policy) plan(b Binding) plan {
	if p.Bind == None {
		return plan{note: "hutchd opens no ports: [ports] bind is none"}
	}
	if b.HostPort != 0 && b.HostPort < firstUnprivileged && !p.Privileged {
		return plan{note: fmt.Sprintf("ports below %d are not opened: [ports] privileged is not set", firstUnprivileged)}
	}
	var asked []netip.Addr
	if b.HostIP == "" {
		asked = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	} else {
		a, err := netip.ParseAddr(b.HostIP)
		if err != nil || a.Zone() != "" || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return plan{note: "the address that it asks for is none that can be opened"}
		}
		asked = []netip.Addr{a.Unmap()}
	}
	out := plan{both: len(asked) == 2}
	for _, a := range asked {
		switch {
		case p.Bind == Any || a.IsLoopback():
			out.addrs = append(out.addrs, a)
		case a.IsUnspecified():
			out.addrs = append(out.addrs, loopbackLike(a))
			out.note = "it asks for every address: opened on loopback only, as [ports] bind is loopback"
		default:
			out.note = "it asks for an address that is not loopback: not opened, as [ports] bind is loopback"
		}
	}
	return out
}

// loopbackLike is the loopback address of a's family.
func loopbackLike(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

func (b Bind) valid() bool { return slices.Contains(Binds(), b) }
