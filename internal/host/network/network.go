package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/undo"
)

// Params says what Open needs.
type Params struct {
	// Root tells this hutch from others on the host: its root directory. It
	// must be the same at every start.
	Root string
	// Dir is where the namespaces are mounted; it is made if missing. It must
	// be the same as long as slots are alive.
	Dir string
	// Slots is how many slots there may be. 0 means MaxSlots.
	Slots int
	// Resolvers are the name servers that guests' questions are sent to, at
	// most three. Nil means those of the host, see HostResolvers.
	Resolvers []netip.Addr
	// HostNetns is the path of the namespace that counts as the host's. Empty
	// means the caller's own.
	HostNetns string
	// Logger may be nil.
	Logger *slog.Logger
}

// Network is the one implementation of Slots.
type Network struct {
	dir       string
	log       *slog.Logger
	host      *namespace
	names     names
	resolvers []netip.Addr
	ledger    *ledger

	tableMu  sync.Mutex     // held over transactions on the host's table
	policies map[int]policy // guarded by tableMu; those that are not plain
	owner    string

	stop   context.CancelFunc // ends the background goroutines
	work   sync.WaitGroup     // the background goroutines
	wake   chan struct{}      // capacity 1
	wantMu sync.Mutex
	want   int // guarded by wantMu; slots to keep prepared

	closing sync.Mutex
	closed  bool // guarded by closing

	// after, when set by a test, is called after each named step; its error
	// fails the step.
	after func(step string) error
}

var _ Slots = (*Network)(nil)

// Open takes the root's part of the host's network: it loads the root's
// nftables table, keeping the policies of slots that are alive, and lets the
// host forward packets if it doesn't yet. Callers hold the root's lock, so
// that one process at a time has the root open.
func Open(ctx context.Context, p Params) (*Network, error) {
	if p.Root == "" || p.Dir == "" {
		return nil, fault.New(fault.Invalid, "network: root and directory must be given")
	}
	if p.Slots < 0 || p.Slots > MaxSlots {
		return nil, fault.BadField("slots", "%d is not in 1..%d", p.Slots, MaxSlots)
	}
	if p.Slots == 0 {
		p.Slots = MaxSlots
	}
	if p.Logger == nil {
		p.Logger = slog.New(slog.DiscardHandler)
	}
	if p.HostNetns == "" {
		p.HostNetns = ownNetns
	}
	resolvers, err := chooseResolvers(p.Resolvers)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(p.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make directory for network namespaces: %w", err)
	}
	host, err := openNamespace(p.HostNetns)
	if err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	n := &Network{
		dir: p.Dir, log: p.Logger, host: host, resolvers: resolvers, owner: rootHash(filepath.Clean(p.Root)),
		stop: stop, wake: make(chan struct{}, 1),
	}
	if err := n.open(filepath.Clean(p.Root), p.Slots); err != nil {
		stop()
		return nil, errors.Join(fmt.Errorf("open network: %w", err), host.close())
	}
	n.work.Go(func() { n.keepPrepared(run) })
	n.work.Go(func() { n.keepTable(run) })
	return n, nil
}

func (n *Network) open(root string, slots int) error {
	if err := n.takeTable(root); err != nil {
		return err
	}
	// Roots begin at different places, so that they rarely want the same address.
	b := tagOf(root, 0)
	n.ledger = newLedger(slots, int(b[0])<<8|int(b[1])*31+int(b[2]))
	if _, err := n.lookForOthers(); err != nil {
		return err
	}
	// What an earlier process left is nobody's until Adopt or Reclaim.
	left, err := n.found()
	if err != nil {
		return err
	}
	for index := range left {
		n.ledger.end(index, setAside)
	}
	return n.enableForwarding()
}

// forwardingFile keeps what the host's setting was before hutch changed it.
const forwardingFile = "ip_forward.before"

// ensureHost restores what slots need of the host, should somebody have taken
// it away.
func (n *Network) ensureHost() error {
	if err := n.ensureTable(); err != nil {
		return err
	}
	return n.enableForwarding()
}

// enableForwarding lets the host forward IPv4 if it does not. The setting is
// never taken back, for others may have come to need it; what it was is kept
// in a file beside the namespaces.
func (n *Network) enableForwarding() error {
	const setting4 = "/proc/sys/net/ipv4/ip_forward"
	return n.host.do(func() error {
		was, err := os.ReadFile(setting4)
		if err != nil {
			return fmt.Errorf("read whether the host forwards packets: %w", err)
		}
		if len(was) > 0 && was[0] == '1' {
			return nil
		}
		if err := os.WriteFile(filepath.Join(n.dir, forwardingFile), was, 0o644); err != nil {
			return fmt.Errorf("note that the host did not forward packets: %w", err)
		}
		if err := apply([]setting{{path: "ipv4/ip_forward", value: "1"}}); err != nil {
			return fmt.Errorf("let the host forward packets: %w", err)
		}
		n.log.Warn("turned packet forwarding on, it was off", "setting", setting4)
		return nil
	})
}

// Close lets go of the network. Slots of sandboxes stay, and so do the rules
// that they need; prepared slots are removed, and without any slot left the
// rules are too. Closing again does nothing.
func (n *Network) Close(ctx context.Context) error {
	n.closing.Lock()
	defer n.closing.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	n.stop()
	n.work.Wait()
	ctx, cancel := undo.Detach(ctx)
	defer cancel()
	var errs []error
	for {
		index, ok := n.ledger.nextPrepared()
		if !ok {
			break
		}
		errs = append(errs, n.finish(index, n.tearDown(ctx, index)))
	}
	left, err := n.found()
	errs = append(errs, err)
	if err == nil && len(left) == 0 {
		errs = append(errs, n.host.do(func() error { return withNft(n.hostRules().remove) }))
	}
	return errors.Join(append(errs, n.host.close())...)
}

// DNS tells the addresses that guests ask for names, best first. It is empty
// when the host has no resolver that can be reached from outside of itself.
func (n *Network) DNS() []string {
	var out []string
	for i := range n.resolvers {
		out = append(out, dnsAddrs()[i].String())
	}
	return out
}
