package ports

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// Binding is one port that an owner publishes.
type Binding struct {
	Protocol      string `json:"protocol"`          // "tcp" or "udp"
	HostIP        string `json:"host_ip,omitempty"` // empty: every address
	HostPort      uint16 `json:"host_port"`         // 0: any that is free
	ContainerPort uint16 `json:"container_port"`
}

// Owner is who publishes in a sandbox, and all of what: a container by its id,
// a Service as "service/NAMESPACE/NAME", or the cluster's API as "kubernetes".
type Owner struct {
	ID       string
	Name     string // for people
	Bindings []Binding
}

// guestPort is where in the guest a binding of owner leads. Docker publishes
// on the host's number there, and passes on to the container by itself; of a
// Service and the API the other number is one of the machine.
func (b Binding) guestPort(owner string) uint16 {
	if b.HostPort == 0 || owner == apiOwner || strings.Contains(owner, "/") {
		return b.ContainerPort
	}
	return b.HostPort
}

// apiOwner publishes a cluster's API.
const apiOwner = "kubernetes"

// Kind is what an Event tells.
type Kind uint8

// The kinds.
const (
	Changed Kind = iota + 1 // the full set of Owner
	Removed                 // Owner publishes nothing any more
	Synced                  // what this stream has not told is no more
)

// Event is one thing that a guest tells.
type Event struct {
	Kind  Kind
	Owner Owner // of Removed only the ID; of Synced nothing
}

// Guest is the guest of a sandbox. guestconn.Guest is one.
type Guest interface {
	// DialPort opens a TCP connection to a port of the guest.
	DialPort(ctx context.Context, port uint16) (net.Conn, error)
	// DialUDP opens a flow to a UDP port of the guest: each Read and Write is one
	// datagram.
	DialUDP(ctx context.Context, port uint16) (net.Conn, error)
}

// Sandboxes is what the table needs of the sandboxes.
type Sandboxes interface {
	// Use holds a sandbox active, and gives its guest, until done is called. It
	// resumes one that sleeps when its spec says so.
	Use(ctx context.Context, id sandbox.ID) (g Guest, done func(), err error)
	// Watch has the guest of a running sandbox tell each what it publishes, all
	// of it first, until ctx ends or the guest is lost. It is no use of the
	// sandbox. fault.Denied and fault.Unimplemented are guests that can't,
	// fault.Precondition and fault.NotFound sandboxes that do not run.
	Watch(ctx context.Context, id sandbox.ID, each func(Event) error) error
}

// Published is one binding, and what became of it.
type Published struct {
	Sandbox     sandbox.ID
	Owner, Name string
	Binding
	// Addresses of the host on which it is open, at Port.
	Addresses []netip.Addr
	Port      uint16
	// Problem says why it is not open, or not as was asked for.
	Problem string
}

// TakenError is a port of the host that could not be had.
type TakenError struct {
	Binding Binding
	Address netip.AddrPort
	By      string // who has it, when that is known: "web of sandbox x"
	Err     error  // of the system, when it knew
}

// Error is what net.Listen says for the address that was asked for, and who
// has the port.
func (e *TakenError) Error() string {
	asked, network := e.asked(), e.Binding.Protocol+"4"
	if asked.Addr().Is6() {
		network = e.Binding.Protocol + "6"
	}
	err := e.Err
	if err == nil {
		err = syscall.EADDRINUSE
	}
	s := fmt.Sprintf("listen %s %s: bind: %v", network, asked, err)
	if e.By != "" {
		s += " (" + e.By + ")"
	}
	return s
}

// asked is the address before policy.
func (e *TakenError) asked() netip.AddrPort {
	a := e.Address.Addr()
	switch asked, err := netip.ParseAddr(e.Binding.HostIP); {
	case err == nil:
		a = asked.Unmap()
	case a.Is4():
		a = netip.IPv4Unspecified()
	default:
		a = netip.IPv6Unspecified()
	}
	return netip.AddrPortFrom(a, e.Address.Port())
}

// Unwrap returns the system's error.
func (e *TakenError) Unwrap() error { return e.Err }
