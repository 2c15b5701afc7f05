package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// odd is a policy that leaves marks in every place.
func odd() sandbox.Policy {
	return sandbox.Policy{Mode: sandbox.ModeNone, Allow: []string{"10.1.0.0/16", "255.255.255.0/24"}}
}

func TestReleaseLeavesNothing(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, nil)
	before := w.state(t)
	for _, p := range []sandbox.Policy{internet(), odd(), {Mode: sandbox.ModeAllow, Allow: []string{"10.1.0.0/16"}}} {
		s := acquire(t, n, p)
		g := w.guest(t, n, s)
		serve(t, g.ns, "guest", "0.0.0.0:8080")
		serve(t, w.outside, "outside", fmt.Sprintf("%s:%d", privateIP, 1000+s.Index%1000))
		answers(t, w.host, "tcp4", s.HostIP.String()+":8080", "guest sees "+GatewayIP)
		if p.Mode != sandbox.ModeInternet {
			answers(t, g.ns, "udp4", fmt.Sprintf("%s:%d", privateIP, 1000+s.Index%1000), "outside sees "+hostPublic)
		}
		if !slices.ContainsFunc(w.flows(t), func(f string) bool { return strings.Contains(f, s.HostIP.String()) }) {
			t.Fatal("no flow of the sandbox is known, so this test could not see one that stays")
		}
		must(t, n.Release(testenv.Context(t), s.Index))
		if diff := cmp.Diff(before, w.state(t)); diff != "" {
			t.Errorf("after release (-before +after):\n%s", diff)
		}
		must(t, n.Release(testenv.Context(t), s.Index)) // a free slot
	}
	must(t, n.Close(testenv.Context(t)))
	if left := w.state(t); slices.ContainsFunc(left, func(s string) bool { return strings.HasPrefix(s, "table") }) {
		t.Errorf("after close: %q", left)
	}
}

func TestAnAcquireThatFailsAtAnyStepLeavesNothing(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, nil)
	before := w.state(t)
	boom := errors.New("boom")
	for _, s := range n.steps(1, defaultPolicy()) {
		n.after = func(step string) error {
			if step == s.name {
				return boom
			}
			return nil
		}
		if _, err := n.Acquire(testenv.Context(t), odd()); !errors.Is(err, boom) || !strings.Contains(err.Error(), s.name) {
			t.Errorf("broken after %s: %v", s.name, err)
		}
		if diff := cmp.Diff(before, w.state(t)); diff != "" {
			t.Errorf("broken after %s (-before +after):\n%s", s.name, diff)
		}
		// The caller goes away at the same point.
		ctx, cancel := context.WithCancel(testenv.Context(t))
		n.after = func(step string) error {
			if step == s.name {
				cancel()
			}
			return nil
		}
		got, err := n.Acquire(ctx, odd())
		cancel()
		if err == nil { // it was the last step
			must(t, n.Release(testenv.Context(t), got.Index))
		} else if !fault.Is(err, fault.Canceled) {
			t.Errorf("cancelled after %s: %v", s.name, err)
		}
		if diff := cmp.Diff(before, w.state(t)); diff != "" {
			t.Errorf("cancelled after %s (-before +after):\n%s", s.name, diff)
		}
	}
	if used, _ := n.Usage(); used != 0 {
		t.Errorf("%d slots are in use", used)
	}
}

func TestTheHighestSlotWorksAndTheLowestComesAfterIt(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	serve(t, w.outside, "internet", internetIP+":80")
	n.ledger.last = MaxSlots - 1
	for _, want := range []int{MaxSlots, 1} {
		s := acquire(t, n, odd())
		if s.Index != want || s.HostIP != hostIPOf(want) {
			t.Fatalf("got slot %+v, want %d", s, want)
		}
		if name := filepath.Base(s.Netns); len(name) > unix.IFNAMSIZ-1 {
			t.Errorf("name %s is longer than an interface's can be", name)
		}
		g := w.guest(t, n, s)
		serve(t, g.ns, "guest", "0.0.0.0:8080")
		answers(t, w.host, "tcp4", s.HostIP.String()+":8080", "guest sees "+GatewayIP)
		refuses(t, g.ns, "tcp4", internetIP+":80")
		must(t, n.Release(testenv.Context(t), s.Index))
	}
	if _, total := n.Usage(); total != MaxSlots {
		t.Errorf("there are %d slots, want %d", total, MaxSlots)
	}
}

func TestFiftyAcquiresAndReleasesAtOnce(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, nil)
	n.Prepare(3)
	before := w.outsideOfSlots(t)
	var mu sync.Mutex
	seen := map[netip.Addr]bool{}
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			p := internet()
			if i%2 == 1 {
				p = odd()
			}
			s, err := n.Acquire(testenv.Context(t), p)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			if seen[s.HostIP] {
				t.Errorf("%s was given out twice", s.HostIP)
			}
			seen[s.HostIP] = true
			mu.Unlock()
			if _, err := n.Stats(testenv.Context(t), s.Index); err != nil {
				t.Error(err)
			}
			if err := n.Release(testenv.Context(t), s.Index); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if used, _ := n.Usage(); used != 0 {
		t.Errorf("%d slots are in use after all were released", used)
	}
	n.Prepare(0)
	must(t, n.Close(testenv.Context(t)))
	if diff := cmp.Diff(before, w.outsideOfSlots(t)); diff != "" {
		t.Errorf("after close (-before +after):\n%s", diff)
	}
	mustBeHome(t)
}

// outsideOfSlots is the state without what the network itself keeps.
func (w *world) outsideOfSlots(t testing.TB) []string {
	t.Helper()
	return slices.DeleteFunc(w.state(t), func(s string) bool {
		return strings.Contains(s, "hu-") || strings.HasPrefix(s, "table ") || strings.HasPrefix(s, "route 198.1")
	})
}

// mustBeHome fails the test if a thread of the process is in another network
// namespace than the process.
func mustBeHome(t testing.TB) {
	t.Helper()
	home, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	must(t, err)
	for _, path := range threads {
		ns, err := os.Readlink(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread ended
		}
		must(t, err)
		if ns != home {
			t.Errorf("%s is %s, the process is in %s", path, ns, home)
		}
	}
}

func TestAFreedSlotIsNotTheNextOneGivenOut(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, func(p *Params) { p.Slots = 3 })
	var got []int
	for range 4 {
		s := acquire(t, n, internet())
		got = append(got, s.Index)
		must(t, n.Release(testenv.Context(t), s.Index))
	}
	if got[0] == got[1] || got[1] == got[2] || got[0] == got[2] || got[3] != got[0] {
		t.Errorf("slots came in order %v, want all three before one comes again", got)
	}
}

func TestWithAllSlotsInUseAcquireIsExhausted(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, func(p *Params) { p.Slots = 2 })
	first := acquire(t, n, internet())
	acquire(t, n, internet())
	if _, err := n.Acquire(testenv.Context(t), internet()); !fault.Is(err, fault.Exhausted) {
		t.Fatalf("the third of two slots: %v", err)
	}
	must(t, n.Release(testenv.Context(t), first.Index))
	if again := acquire(t, n, internet()); again.Index != first.Index {
		t.Errorf("got slot %d, only %d was free", again.Index, first.Index)
	}
}

func TestTwoRootsShareAHost(t *testing.T) {
	w := newWorld(t)
	var roots []*Network
	for i := range 2 {
		roots = append(roots, w.open(t, func(p *Params) {
			p.Root, p.Slots = fmt.Sprintf("%s/root%d", w.dir, i), 8
			if i == 1 {
				p.Dir = filepath.Join(w.dir, "netns2")
			}
		}))
		roots[i].ledger.last = 0 // as near to each other as can be
	}
	var mu sync.Mutex
	owner := map[netip.Addr]*Network{}
	slots := map[*Network][]Slot{}
	var all sync.WaitGroup
	for _, n := range roots {
		for range 4 {
			all.Go(func() {
				s, err := n.Acquire(testenv.Context(t), internet())
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if owner[s.HostIP] != nil {
					t.Errorf("%s was given out by both", s.HostIP)
				}
				owner[s.HostIP] = n
				slots[n] = append(slots[n], s)
			})
		}
	}
	all.Wait()
	if t.Failed() {
		return
	}
	for _, n := range roots {
		if _, err := n.Acquire(testenv.Context(t), internet()); !fault.Is(err, fault.Exhausted) {
			t.Errorf("all addresses are held, yet: %v", err)
		}
	}
	a, b := w.guest(t, roots[0], slots[roots[0]][0]), w.guest(t, roots[1], slots[roots[1]][0])
	addrA, addrB := slots[roots[0]][0].HostIP.String()+":8080", slots[roots[1]][0].HostIP.String()+":8080"
	serve(t, w.outside, "internet", internetIP+":80")
	serve(t, a.ns, "a", "0.0.0.0:8080")
	serve(t, b.ns, "b", "0.0.0.0:8080")
	refuses(t, a.ns, "tcp4", addrB)
	refuses(t, b.ns, "tcp4", addrA)

	// One of them clears everything of its own and goes; the other doesn't notice.
	must(t, roots[0].Reclaim(testenv.Context(t), nil)) // its slots are in use, so nothing happens
	answers(t, w.host, "tcp4", addrA, "a sees "+GatewayIP)
	w.shut(t, roots[0])
	answers(t, w.host, "tcp4", addrB, "b sees "+GatewayIP)
	answers(t, b.ns, "tcp4", internetIP+":80", "internet sees "+hostPublic)
	acquire(t, roots[1], internet()) // an address that the other gave back
}

func TestAfterACrashLiveSlotsAreAdoptedAndTheRestIsReclaimed(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, func(p *Params) { p.Slots = 8 })
	empty := w.state(t)
	live := acquire(t, n, odd())
	lost, gone := acquire(t, n, odd()), acquire(t, n, internet())
	n.Prepare(2)
	must(t, n.ledger.wait(testenv.Context(t), func() bool { return n.ledger.count(prepared) == 2 && n.ledger.count(busy) == 0 }))
	w.crash(t, n)

	// What a crash, or somebody else, may leave half.
	must(t, w.host.do(func() error {
		return withRoutes(func(h *netlink.Handle) error { return removeLink(h, n.names.slot(gone.Index)) })
	}))
	must(t, removeNamespace(lost.Netns))
	for index := range 8 {
		if n.ledger.is(index+1, free) {
			must(t, os.WriteFile(n.path(index+1), nil, 0o444))
		}
	}

	n = w.open(t, func(p *Params) { p.Slots = 8 })
	if used, _ := n.Usage(); used < 5 {
		t.Errorf("%d slots count as used before anybody said what is live", used)
	}
	for _, s := range []Slot{lost, gone} {
		if _, err := n.Adopt(testenv.Context(t), s.Index, internet()); !fault.Is(err, fault.NotFound) {
			t.Errorf("adopting a slot of which a part is missing: %v", err)
		}
	}
	s, err := n.Adopt(testenv.Context(t), live.Index, odd())
	must(t, err)
	if diff := cmp.Diff(live, s, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("adopted (-want +got):\n%s", diff)
	}
	if _, err := n.Adopt(testenv.Context(t), live.Index, odd()); !fault.Is(err, fault.Exists) {
		t.Errorf("adopting twice: %v", err)
	}
	must(t, n.Reclaim(testenv.Context(t), []int{live.Index}))
	if used, _ := n.Usage(); used != 1 {
		t.Errorf("%d slots are in use, want the live one", used)
	}
	g := w.guest(t, n, s)
	serve(t, w.outside, "outside", privateIP+":80")
	answers(t, g.ns, "tcp4", privateIP+":80", "outside sees "+hostPublic)
	must(t, n.Release(testenv.Context(t), live.Index))
	if diff := cmp.Diff(empty, w.state(t)); diff != "" {
		t.Errorf("after all (-want +got):\n%s", diff)
	}
}

func TestCloseKeepsTheSlotsOfSandboxes(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, odd())
	before := w.state(t)
	n.Prepare(2)
	must(t, n.ledger.wait(testenv.Context(t), func() bool { return n.ledger.count(prepared) == 2 }))
	must(t, n.Close(testenv.Context(t)))
	if diff := cmp.Diff(before, w.state(t)); diff != "" {
		t.Errorf("after close (-want +got):\n%s", diff)
	}
	n = w.open(t, nil)
	if diff := cmp.Diff(before, w.state(t)); diff != "" {
		t.Errorf("after opening again (-want +got):\n%s", diff)
	}
	_, err := n.Adopt(testenv.Context(t), s.Index, odd())
	must(t, err)
}

func TestPreparedSlotsAreTakenAndReplaced(t *testing.T) {
	testenv.CheckGoroutines(t)
	w := newWorld(t)
	n := w.open(t, nil)
	ready := func() bool { return n.ledger.count(prepared) == 2 && n.ledger.count(busy) == 0 }
	n.Prepare(2)
	must(t, n.ledger.wait(testenv.Context(t), ready))
	serve(t, w.outside, "internet", internetIP+":80")
	for _, p := range []sandbox.Policy{internet(), {Mode: sandbox.ModeNone}} {
		n.ledger.mu.Lock()
		first := n.ledger.ready[0]
		n.ledger.mu.Unlock()
		s := acquire(t, n, p)
		if s.Index != first {
			t.Errorf("got slot %d, the oldest prepared one was %d", s.Index, first)
		}
		g := w.guest(t, n, s)
		if p.Mode == sandbox.ModeInternet {
			answers(t, g.ns, "tcp4", internetIP+":80", "internet sees "+hostPublic)
		} else {
			refuses(t, g.ns, "tcp4", internetIP+":80")
		}
		must(t, n.ledger.wait(testenv.Context(t), ready))
	}
	if used, _ := n.Usage(); used != 2 {
		t.Errorf("%d slots are in use, want 2: prepared ones are not", used)
	}
	// A slot that can't be given its policy is not given out, and not kept.
	before := w.state(t)
	n.Prepare(0)
	boom := errors.New("boom")
	n.after = func(step string) error {
		if step == "dress" {
			return boom
		}
		return nil
	}
	if _, err := n.Acquire(testenv.Context(t), odd()); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	if after := w.state(t); len(after) >= len(before) {
		t.Errorf("the prepared slot is still there: %q", after)
	}
}

func TestASlotThatCannotBeRemovedIsSetAsideUntilItCan(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, func(p *Params) { p.Slots = 1 })
	s := acquire(t, n, internet())
	boom := errors.New("boom")
	n.after = func(string) error { return boom }
	if err := n.Release(testenv.Context(t), s.Index); !errors.Is(err, boom) {
		t.Fatalf("release: %v", err)
	}
	n.after = nil
	if _, err := n.Acquire(testenv.Context(t), internet()); !fault.Is(err, fault.Exhausted) {
		t.Errorf("a slot that was set aside was given out: %v", err)
	}
	if used, total := n.Usage(); used != 1 || total != 1 {
		t.Errorf("usage is %d of %d", used, total)
	}
	must(t, n.Release(testenv.Context(t), s.Index))
	acquire(t, n, internet())
}

func TestReleaseWorksWhileAProcessHoldsTheNamespace(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	before := w.state(t)
	s := acquire(t, n, internet())
	held, err := openNamespace(s.Netns)
	must(t, err)
	defer held.close()
	tap, err := n.OpenTap(testenv.Context(t), s)
	must(t, err)
	defer tap.Close()
	must(t, n.Release(testenv.Context(t), s.Index))
	if diff := cmp.Diff(before, w.state(t)); diff != "" {
		t.Errorf("after release (-before +after):\n%s", diff)
	}
}

func TestATapIsOpenedForOneVMMAtATime(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	tap, err := n.OpenTap(testenv.Context(t), s)
	must(t, err)
	if _, err := n.OpenTap(testenv.Context(t), s); !errors.Is(err, unix.EBUSY) {
		t.Errorf("second open: %v", err)
	}
	flags, err := unix.FcntlInt(tap.Fd(), unix.F_GETFL, 0)
	must(t, err)
	if flags&unix.O_NONBLOCK == 0 {
		t.Error("the tap is in blocking mode")
	}
	ifr, err := unix.NewIfreq("")
	must(t, err)
	must(t, unix.IoctlIfreq(int(tap.Fd()), unix.TUNGETIFF, ifr))
	const want = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if got := ifr.Uint16(); got&want != want || ifr.Name() != tapName {
		t.Errorf("the tap is %s with flags %#x, want %s with %#x", ifr.Name(), got, tapName, want)
	}
	must(t, n.inside(s.Index, func() error {
		return withRoutes(func(h *netlink.Handle) error {
			l, err := h.LinkByName(tapName)
			if err != nil {
				return err
			}
			if a := l.Attrs(); a.HardwareAddr.String() != TapMAC || a.MTU != MTU || a.OperState != netlink.OperUp {
				t.Errorf("tap: %+v", a)
			}
			return nil
		})
	}))
	must(t, tap.Close())
	again, err := n.OpenTap(testenv.Context(t), s)
	must(t, err)
	again.Close()
	must(t, n.Release(testenv.Context(t), s.Index))
	if _, err := n.OpenTap(testenv.Context(t), s); !fault.Is(err, fault.Precondition) {
		t.Errorf("opening the tap of a free slot: %v", err)
	}
	if _, err := n.Stats(testenv.Context(t), s.Index); !fault.Is(err, fault.Precondition) {
		t.Errorf("stats of a free slot: %v", err)
	}
}

func TestATagThatAnotherRootHoldsIsPassedOver(t *testing.T) {
	w := newWorld(t)
	root := filepath.Join(w.dir, "root")
	other := hostRules{names: names{tagOf(root, 0)}, owner: rootHash("somebody else's")}
	must(t, w.host.do(func() error { return withNft(other.load) }))
	n := w.open(t, nil)
	if n.names.tag != tagOf(root, 1) {
		t.Errorf("tag is %s, want the second one, %s", n.names.tag, tagOf(root, 1))
	}
	acquire(t, n, internet())
	must(t, w.host.do(func() error {
		return withNft(func(c *nftables.Conn) error {
			_, owner, err := other.find(c)
			if owner != other.owner {
				t.Errorf("the other root's table is marked %q", owner)
			}
			return err
		})
	}))
}

func TestForwardingIsTurnedOnAndWhatItWasIsKept(t *testing.T) {
	w := newWorld(t)
	read := func() (v string) {
		must(t, w.host.do(func() error {
			b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
			v = strings.TrimSpace(string(b))
			return err
		}))
		return v
	}
	if read() != "0" {
		t.Fatal("the host forwards before anybody asked it to")
	}
	n := w.open(t, nil)
	if read() != "1" {
		t.Error("the host does not forward")
	}
	b, err := os.ReadFile(filepath.Join(w.dir, "netns", forwardingFile))
	if err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Errorf("the note says %q, %v", b, err)
	}
	must(t, w.host.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0) }))
	s := acquire(t, n, internet())
	if read() != "1" {
		t.Error("somebody turned forwarding off, and it stays off")
	}
	must(t, n.Release(testenv.Context(t), s.Index))
	must(t, n.Close(testenv.Context(t)))
	if read() != "1" {
		t.Error("the setting was taken back, though others may need it by now")
	}
}

func TestBadParamsAndPoliciesAreRefusedByField(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	before := w.state(t)
	many := make([]string, MaxAllow+1)
	for i := range many {
		many[i] = "10.0.0.0/8"
	}
	for _, c := range []struct {
		policy sandbox.Policy
		field  string
	}{
		{sandbox.Policy{Mode: "everything"}, "network.mode"},
		{sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"10.0.0.1"}}, "network.allow"},
		{sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"example.org"}}, "network.allow"},
		{sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"fd00::/8"}}, "network.allow"},
		{sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"::ffff:10.0.0.0/104"}}, "network.allow"},
		{sandbox.Policy{Mode: sandbox.ModeAllow, Allow: many}, "network.allow"},
	} {
		_, err := n.Acquire(testenv.Context(t), c.policy)
		var f *fault.Error
		if !errors.As(err, &f) || f.Class != fault.Invalid || f.Field != c.field {
			t.Errorf("%+v: %v", c.policy, err)
		}
	}
	for _, index := range []int{0, -1, MaxSlots + 1} {
		if err := n.Release(testenv.Context(t), index); !fault.Is(err, fault.Invalid) {
			t.Errorf("release of slot %d: %v", index, err)
		}
		if _, err := n.Adopt(testenv.Context(t), index, internet()); !fault.Is(err, fault.Invalid) {
			t.Errorf("adopt of slot %d: %v", index, err)
		}
	}
	for _, p := range []Params{
		{}, {Root: "/x"}, {Root: "/x", Dir: w.dir, Slots: MaxSlots + 1}, {Root: "/x", Dir: w.dir, Slots: -1},
		{Root: "/x", Dir: w.dir, Resolvers: []netip.Addr{netip.MustParseAddr("127.0.0.53")}},
		{Root: "/x", Dir: w.dir, HostNetns: filepath.Join(w.dir, "nothing")},
		{Root: "/x", Dir: w.dir, HostNetns: "/proc/self/status"},
	} {
		if n, err := Open(testenv.Context(t), p); err == nil {
			t.Errorf("%+v was accepted", p)
			n.Close(testenv.Context(t))
		}
	}
	if diff := cmp.Diff(before, w.state(t)); diff != "" {
		t.Errorf("something was left (-before +after):\n%s", diff)
	}
}
