package network

import (
	"context"
	"net/netip"
	"os"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// What every guest sees, in any slot, so that any snapshot fits any slot.
const (
	GuestAddr = "198.18.0.2/30"
	GatewayIP = "198.18.0.1"
	GuestMAC  = "02:68:74:63:68:02"
	TapMAC    = "02:68:74:63:68:01"
	// HostRange holds the host's addresses of all slots: slot n is the n-th.
	HostRange = "198.19.0.0/16"
	MTU       = 1500
)

// Slot is a prepared place in the network.
type Slot struct {
	Index  int        // 1..MaxSlots
	HostIP netip.Addr // the sandbox, as seen from the host
	Netns  string     // path of its network namespace
}

// Stats is the traffic of a slot, as the sandbox sees it.
type Stats struct {
	RxBytes, TxBytes, RxPackets, TxPackets uint64
}

// Slots hands out network places. It is safe for concurrent use.
type Slots interface {
	// Acquire takes a free slot and sets it up for policy p. With no slot free
	// it is a fault.Exhausted. On error nothing is left behind.
	Acquire(ctx context.Context, p sandbox.Policy) (Slot, error)
	// OpenTap opens the slot's tap for a VMM: with a virtio-net header, attached
	// and up. The caller closes it.
	OpenTap(ctx context.Context, s Slot) (*os.File, error)
	// Release takes the slot down and verifies that nothing of it is left, its
	// old flows included, before it may be used again. A slot whose removal
	// fails is set aside and the error returned; releasing again tries again.
	// Releasing a free slot is no error.
	Release(ctx context.Context, index int) error
	// SetPolicy gives a slot that is taken another policy, for connections that
	// begin from now on. On error the old one may hold, or the new one.
	SetPolicy(ctx context.Context, index int, p sandbox.Policy) error
	// Adopt marks the slot of a sandbox that is alive as taken, after a restart.
	Adopt(ctx context.Context, index int, p sandbox.Policy) (Slot, error)
	// Reclaim removes every slot found on the host that is not in live.
	Reclaim(ctx context.Context, live []int) error
	// Stats reads the counters of a slot.
	Stats(ctx context.Context, index int) (Stats, error)
	// Usage tells how many slots are taken and how many there are.
	Usage() (used, total int)
}
