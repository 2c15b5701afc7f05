package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

func protocols() []string { return []string{"tcp4", "udp4"} }

func TestAGuestReachesTheInternetAndTheHostReachesTheGuest(t *testing.T) {
	testenv.CheckGoroutines(t)
	w, _, s, g := oneGuest(t)
	serve(t, w.outside, "internet", internetIP+":80")
	serve(t, g.ns, "guest", "0.0.0.0:8080")
	for _, p := range protocols() {
		answers(t, g.ns, p, internetIP+":80", "internet sees "+hostPublic)
		answers(t, w.host, p, s.HostIP.String()+":8080", "guest sees "+GatewayIP)
	}
}

func TestAHostWithoutAnyNetworkReachesItsGuests(t *testing.T) {
	w := newWorld(t)
	must(t, w.host.do(func() error {
		return withRoutes(func(h *netlink.Handle) error { return removeLink(h, "wan0") })
	}))
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	g := w.guest(t, n, s)
	serve(t, g.ns, "guest", "0.0.0.0:8080")
	answers(t, w.host, "tcp4", s.HostIP.String()+":8080", "guest sees "+GatewayIP)
	refuses(t, g.ns, "tcp4", GatewayIP+":53")
}

// serveOutside makes every address of the outside answer on port 80.
func (w *world) serveOutside(t *testing.T) {
	t.Helper()
	for _, ip := range []string{internetIP, privateIP, metadataIP, resolverIP} {
		serve(t, w.outside, "outside", ip+":80")
	}
}

// forbidden are addresses that no policy opens: the host and other sandboxes.
func (w *world) forbidden(t *testing.T, own, other Slot) []string {
	t.Helper()
	serve(t, w.host, "host", "0.0.0.0:22")
	return []string{
		GatewayIP + ":22", hostPublic + ":22", hostPrivate + ":22",
		vethIPOf(own.Index).String() + ":22", vethIPOf(other.Index).String() + ":22",
		other.HostIP.String() + ":8080", own.HostIP.String() + ":8080",
	}
}

// nonPublic are addresses that only a list opens.
func nonPublic() []string {
	return []string{privateIP + ":80", metadataIP + ":80", resolverIP + ":80", "192.168.99.1:80", "172.16.3.4:80", "100.64.0.1:80", "240.0.0.1:80", "198.18.0.53:80"}
}

func TestWhatAGuestMayNotReachIsRefusedAtOnce(t *testing.T) {
	for _, c := range []struct {
		name   string
		policy sandbox.Policy
		open   []string // of internet, private and names
	}{
		{"internet", internet(), []string{"internet", "names"}},
		{"internet and a private prefix", sandbox.Policy{Mode: sandbox.ModeInternet, Allow: []string{"10.1.0.0/16"}}, []string{"internet", "private", "names"}},
		{"none", sandbox.Policy{Mode: sandbox.ModeNone}, nil},
		{"none but a private prefix", sandbox.Policy{Mode: sandbox.ModeNone, Allow: []string{"10.1.2.3/32"}}, []string{"private"}},
		{"a list", sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"10.1.2.0/24", "10.1.2.3/32"}}, []string{"private", "names"}},
		{"a list of everything", sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"0.0.0.0/0"}}, []string{"internet", "private", "names"}},
		{"an empty list", sandbox.Policy{Mode: sandbox.ModeAllow}, []string{"names"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			n := w.open(t, nil)
			s, other := acquire(t, n, c.policy), acquire(t, n, internet())
			g, neighbour := w.guest(t, n, s), w.guest(t, n, other)
			serve(t, neighbour.ns, "neighbour", "0.0.0.0:8080")
			w.serveOutside(t)
			serve(t, w.outside, "resolver", resolverIP+":53")
			for _, p := range protocols() {
				answers(t, w.host, p, other.HostIP.String()+":8080", "neighbour sees "+GatewayIP)
			}
			for _, a := range w.forbidden(t, s, other) {
				refuses(t, g.ns, "tcp4", a)
			}
			refuses(t, g.ns, "udp4", hostPublic+":22")
			places := map[string][2]string{
				"internet": {internetIP + ":80", "outside sees " + hostPublic},
				"private":  {privateIP + ":80", "outside sees " + hostPublic},
				"names":    {GatewayIP + ":53", "resolver sees " + hostPublic},
			}
			for name, place := range places {
				for _, p := range protocols() {
					if slices.Contains(c.open, name) {
						answers(t, g.ns, p, place[0], place[1])
					} else {
						refuses(t, g.ns, p, place[0])
					}
				}
			}
			if !slices.Contains(c.policy.Allow, "0.0.0.0/0") {
				for _, a := range nonPublic()[1:] {
					refuses(t, g.ns, "tcp4", a)
				}
			}
		})
	}
}

// plainAndOpen are the modes by themselves, and a list of everything, which
// still does not open other sandboxes and the host.
func plainAndOpen() []sandbox.Policy {
	return []sandbox.Policy{
		{Mode: sandbox.ModeInternet}, {Mode: sandbox.ModeNone}, {Mode: sandbox.ModeAllow},
		{Mode: sandbox.ModeAllow, Allow: []string{"0.0.0.0/0"}},
	}
}

// The rules of the host hold by themselves: here those inside the slot are
// loaded as open as they can be.
func TestTheHostRefusesWhatASlotLetsThrough(t *testing.T) {
	for _, p := range plainAndOpen() {
		mode, all := p.Mode, len(p.Allow) > 0
		t.Run(fmt.Sprint(mode, p.Allow), func(t *testing.T) {
			w := newWorld(t)
			n := w.open(t, func(p *Params) { p.Resolvers = append(p.Resolvers, netip.MustParseAddr(hostPrivate)) })
			s, other := acquire(t, n, p), acquire(t, n, internet())
			g := w.guest(t, n, s)
			must(t, n.inside(s.Index, func() error {
				return withNft(func(c *nftables.Conn) error {
					open := n.slotRules(s.Index, policy{mode: sandbox.ModeAllow, open: spansOf("0.0.0.0/0")})
					if err := open.load(c, replaceTable); err != nil {
						return err
					}
					// The slots' own addresses, too.
					hutch := spanSet("hutch")
					hutch.Table = &nftables.Table{Family: nftables.TableFamilyINet, Name: slotTable}
					c.FlushSet(hutch)
					return c.Flush()
				})
			}))
			w.serveOutside(t)
			serve(t, w.outside, "resolver", resolverIP+":53")
			for _, a := range w.forbidden(t, s, other)[1:] {
				if strings.HasPrefix(a, s.HostIP.String()+":") {
					continue // stays inside
				}
				refuses(t, g.ns, "tcp4", a)
			}
			for _, a := range nonPublic()[:5] {
				if !all {
					refuses(t, g.ns, "tcp4", a)
				}
			}
			if mode != sandbox.ModeInternet && !all {
				refuses(t, g.ns, "tcp4", internetIP+":80")
			} else {
				answers(t, g.ns, "tcp4", internetIP+":80", "outside sees "+hostPublic)
			}
			serve(t, w.host, "host's resolver", hostPrivate+":53")
			if mode == sandbox.ModeNone {
				refuses(t, g.ns, "udp4", GatewayIP+":53")
				refuses(t, g.ns, "udp4", hostPrivate+":53")
			} else {
				answers(t, g.ns, "udp4", hostPrivate+":53", "host's resolver sees "+s.HostIP.String())
				answers(t, g.ns, "udp4", GatewayIP+":53", "resolver sees "+hostPublic)
			}
		})
	}
}

// The rules of a slot hold by themselves: here the host lets everything through.
func TestASlotRefusesWhatTheHostLetsThrough(t *testing.T) {
	for _, p := range plainAndOpen() {
		mode, all := p.Mode, len(p.Allow) > 0
		t.Run(fmt.Sprint(mode, p.Allow), func(t *testing.T) {
			w := newWorld(t)
			n := w.open(t, nil)
			s, other := acquire(t, n, p), acquire(t, n, internet())
			g, neighbour := w.guest(t, n, s), w.guest(t, n, other)
			must(t, w.host.do(func() error {
				return withNft(func(c *nftables.Conn) error {
					for _, chain := range []string{"guard", "input", "forward", "output"} {
						c.FlushChain(&nftables.Chain{Name: chain, Table: n.hostRules().table()})
					}
					return c.Flush()
				})
			}))
			serve(t, neighbour.ns, "neighbour", "0.0.0.0:8080")
			w.serveOutside(t)
			serve(t, w.outside, "resolver", resolverIP+":53")
			for _, a := range w.forbidden(t, s, other) {
				// A slot can't know the host's own addresses.
				if !strings.HasPrefix(a, hostPublic+":") && !(all && strings.HasPrefix(a, hostPrivate+":")) {
					refuses(t, g.ns, "tcp4", a)
				}
			}
			for _, a := range nonPublic() {
				if !all {
					refuses(t, g.ns, "tcp4", a)
				}
			}
			if mode != sandbox.ModeInternet && !all {
				refuses(t, g.ns, "tcp4", internetIP+":80")
			}
			if mode == sandbox.ModeNone {
				refuses(t, g.ns, "udp4", GatewayIP+":53")
			}
			g.claim(t, "198.18.0.99/32")
			heard := listenUDP(t, w.host, hostPublic+":99")
			must(t, say(g.ns, "198.18.0.99", hostPublic+":99", "spoofed"))
			refuses(t, g.ns, "tcp4", GatewayIP+":80") // behind it in the queue
			must(t, heard.SetReadDeadline(time.Now()))
			if k, from, err := heard.ReadFrom(make([]byte, 100)); err == nil {
				t.Errorf("%d bytes of a spoofed source came through, from %v", k, from)
			}
		})
	}
}

func TestNamesAreAskedOfEachResolverByItsOwnAddress(t *testing.T) {
	w := newWorld(t)
	// The second one runs on the host itself, which no policy opens otherwise.
	n := w.open(t, func(p *Params) {
		p.Resolvers = []netip.Addr{netip.MustParseAddr(resolverIP), netip.MustParseAddr(hostPrivate)}
	})
	if got := n.DNS(); !slices.Equal(got, []string{GatewayIP, "198.18.0.53"}) {
		t.Fatalf("guests are told to ask %v", got)
	}
	s := acquire(t, n, internet())
	silent := acquire(t, n, sandbox.Policy{Mode: sandbox.ModeNone})
	g, mute := w.guest(t, n, s), w.guest(t, n, silent)
	serve(t, w.outside, "first", resolverIP+":53")
	serve(t, w.host, "second", hostPrivate+":53")
	serve(t, w.host, "host", hostPrivate+":54")
	for _, p := range protocols() {
		answers(t, g.ns, p, n.DNS()[0]+":53", "first sees "+hostPublic)
		answers(t, g.ns, p, n.DNS()[1]+":53", "second sees "+s.HostIP.String())
		refuses(t, g.ns, p, "198.18.0.54:53")
		refuses(t, g.ns, p, n.DNS()[1]+":54")
		refuses(t, mute.ns, p, n.DNS()[1]+":53")
	}
	refuses(t, g.ns, "tcp4", hostPrivate+":54")
}

func TestASpoofedSourceIsDropped(t *testing.T) {
	w, _, _, g := oneGuest(t)
	const spoofed = "198.19.0.77"
	g.claim(t, spoofed+"/32")
	outside := listenUDP(t, w.outside, internetIP+":99")
	for _, from := range []string{spoofed, guestIP} {
		must(t, say(g.ns, from, internetIP+":99", from))
	}
	hears(t, outside, guestIP) // the tap keeps the order: had the first one passed, it would come first
}

func TestAProcessInTheSlotsNamespaceCannotSend(t *testing.T) {
	w, _, s, g := oneGuest(t)
	slot, err := openNamespace(s.Netns)
	must(t, err)
	defer slot.close()
	heard := listenUDP(t, w.outside, internetIP+":99")
	for _, address := range []string{internetIP + ":99", vethIPOf(s.Index).String() + ":99", guestIP + ":99"} {
		if err := say(slot, "", address, "the slot"); !errors.Is(err, unix.EPERM) {
			t.Errorf("sending from the slot to %s: %v", address, err)
		}
	}
	must(t, say(g.ns, "", internetIP+":99", "the guest"))
	hears(t, heard, "the guest")
}

// flushRules removes every rule of a namespace.
func flushRules(t *testing.T, ns *namespace) {
	t.Helper()
	must(t, ns.do(func() error {
		return withNft(func(c *nftables.Conn) error {
			c.FlushRuleset()
			return c.Flush()
		})
	}))
}

// claim gives the guest's interface one more address.
func (g *guest) claim(t *testing.T, prefix string) {
	t.Helper()
	must(t, g.ns.do(func() error {
		return withRoutes(func(h *netlink.Handle) error { return addr(t, h, tapName, prefix) })
	}))
}

// say sends a packet from an address of ns, empty: as the routes say.
func say(ns *namespace, from, to, text string) error {
	return ns.do(func() error {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("udp4", to)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(text))
		return err
	})
}

func listenTCP(t *testing.T, ns *namespace, address string) net.Listener {
	t.Helper()
	var l net.Listener
	must(t, ns.do(func() (err error) {
		l, err = net.Listen("tcp4", address)
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l
}

func listenUDP(t *testing.T, ns *namespace, address string) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	must(t, ns.do(func() (err error) {
		c, err = net.ListenPacket("udp4", address)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// hears fails the test unless the first packet that comes is want.
func hears(t *testing.T, c net.PacketConn, want string) {
	t.Helper()
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 100)
	k, from, err := c.ReadFrom(buf)
	must(t, err)
	if got := string(buf[:k]); got != want {
		t.Errorf("heard %q from %v, want %q", got, from, want)
	}
}

func TestOthersThatTheHostForwardsForDoNotReachSandboxes(t *testing.T) {
	w, _, s, g := oneGuest(t)
	serve(t, g.ns, "guest", "0.0.0.0:8080")
	must(t, w.outside.do(func() error {
		return withRoutes(func(h *netlink.Handle) error {
			_, slots, err := net.ParseCIDR(HostRange)
			if err != nil {
				return err
			}
			return h.RouteAdd(&netlink.Route{Dst: slots, Gw: net.ParseIP(hostPublic)})
		})
	}))
	refuses(t, w.outside, "tcp4", s.HostIP.String()+":8080")
	refuses(t, w.outside, "udp4", s.HostIP.String()+":8080")
	answers(t, w.host, "tcp4", s.HostIP.String()+":8080", "guest sees "+GatewayIP)
}

func TestTheAddressOfAReleasedSlotIsRefusedAtOnceAndNotAskedOfOthers(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	must(t, n.Release(testenv.Context(t), s.Index))
	must(t, w.outside.do(func() error {
		return withRoutes(func(h *netlink.Handle) error { return addr(t, h, "lo", s.HostIP.String()+"/32") })
	}))
	serve(t, w.outside, "impostor", s.HostIP.String()+":8080")
	refuses(t, w.host, "tcp4", s.HostIP.String()+":8080")
}

// The host's own check of sources: here the slot has no rules at all.
func TestTheHostHearsASlotOnlyByTheSlotsAddress(t *testing.T) {
	w, _, s, g := oneGuest(t)
	slot, err := openNamespace(s.Netns)
	must(t, err)
	defer slot.close()
	flushRules(t, slot)
	heard := listenUDP(t, w.outside, internetIP+":99")
	for _, from := range []*namespace{g.ns, slot} {
		must(t, from.do(func() error {
			c, err := net.Dial("udp4", internetIP+":99")
			if err != nil {
				return err
			}
			defer c.Close()
			local, _, _ := net.SplitHostPort(c.LocalAddr().String())
			_, err = c.Write([]byte(local))
			return err
		}))
		if from == g.ns {
			waitForward(t, slot)
		}
	}
	hears(t, heard, s.HostIP.String())
}

// waitForward returns when the slot has passed on a packet of the guest's.
func waitForward(t *testing.T, slot *namespace) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testenv.Context(t), patience)
	defer cancel()
	for {
		var sent uint64
		must(t, slot.do(func() error {
			return withRoutes(func(h *netlink.Handle) error {
				l, err := h.LinkByName(uplinkName)
				if err == nil {
					sent = l.Attrs().Statistics.TxPackets
				}
				return err
			})
		}))
		if sent > 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("the slot passes nothing on")
		}
	}
}

func TestSegmentsFitThroughANarrowUplink(t *testing.T) {
	w := newWorld(t)
	must(t, w.host.do(func() error {
		return withRoutes(func(h *netlink.Handle) error {
			l, err := h.LinkByName("wan0")
			if err != nil {
				return err
			}
			return h.LinkSetMTU(l, 1400)
		})
	}))
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	g := w.guest(t, n, s)
	l := listenTCP(t, w.outside, internetIP+":80")
	segment := make(chan int, 1)
	go func() {
		defer close(segment)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			return
		}
		raw.Control(func(fd uintptr) {
			size, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG)
			if err == nil {
				segment <- size
			}
		})
	}()
	if _, err := ask(g.ns, "tcp4", internetIP+":80"); err != nil {
		t.Fatal(err)
	}
	if got := <-segment; got > 1360 || got < 1000 {
		t.Errorf("the outside may send segments of %d bytes, the uplink's MTU is 1400", got)
	}
}

// limited gives slot s other limits.
func limited(t *testing.T, n *Network, s Slot, l limits) {
	t.Helper()
	must(t, n.inside(s.Index, func() error {
		return withNft(func(c *nftables.Conn) error {
			r := n.slotRules(s.Index, defaultPolicy())
			r.limits = l
			return r.load(c, replaceTable)
		})
	}))
}

func TestASandboxCannotHaveMoreConnectionsThanItsShare(t *testing.T) {
	w, n, s, g := oneGuest(t)
	listenTCP(t, w.outside, internetIP+":80")
	limited(t, n, s, limits{flows: 10, rate: 500, burst: 2000})
	for range 10 {
		must(t, g.ns.do(func() error {
			c, err := net.DialTimeout("tcp4", internetIP+":80", patience)
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return err
		}))
	}
	refuses(t, g.ns, "tcp4", internetIP+":80")
}

func TestASandboxCannotOpenConnectionsFasterThanItsShare(t *testing.T) {
	w, n, s, g := oneGuest(t)
	limited(t, n, s, limits{flows: 8192, rate: 1, burst: 5})
	started := time.Now()
	must(t, g.ns.do(func() error {
		for range 100 {
			c, err := net.Dial("udp4", internetIP+":9")
			if err != nil {
				return err
			}
			_, err = c.Write([]byte("?"))
			c.Close()
			if err != nil {
				return err
			}
		}
		return nil
	}))
	refuses(t, g.ns, "tcp4", privateIP+":80") // behind them in the queue
	passed := 0
	for _, f := range w.flows(t) {
		if strings.Contains(f, "src="+s.HostIP.String()) && strings.Contains(f, "dport=9") {
			passed++
		}
	}
	if most := 5 + 1 + int(time.Since(started).Seconds()); passed < 5 || passed > most {
		t.Errorf("%d of 100 connections came through, the share is 5 at once and 1 a second", passed)
	}
}

func TestStatsCountWhatTheSandboxSees(t *testing.T) {
	w, n, s, g := oneGuest(t)
	serve(t, w.outside, "internet", internetIP+":80")
	before, err := n.Stats(testenv.Context(t), s.Index)
	must(t, err)
	must(t, g.ns.do(func() error {
		c, err := net.Dial("udp4", internetIP+":9")
		if err != nil {
			return err
		}
		defer c.Close()
		for sent := 0; sent < 10; {
			_, err := c.Write(make([]byte, 1000))
			switch {
			case err == nil:
				sent++
			case !errors.Is(err, unix.ECONNREFUSED): // the answer to an earlier one
				return err
			}
		}
		return nil
	}))
	answers(t, g.ns, "tcp4", internetIP+":80", "internet sees "+hostPublic) // behind them in the queue
	after, err := n.Stats(testenv.Context(t), s.Index)
	must(t, err)
	sent, received := after.TxBytes-before.TxBytes, after.RxBytes-before.RxBytes
	if sent < 10_000 || sent > 20_000 || received == 0 || received > sent || after.TxPackets-before.TxPackets < 10 {
		t.Errorf("the sandbox sent 10 kB and received little, stats say %d and %d: %+v, %+v", sent, received, before, after)
	}
}

func TestAConnectionSurvivesTheRestartOfItsOwner(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	p := sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"10.1.2.3/32"}}
	s := acquire(t, n, p)
	g := w.guest(t, n, s)
	l := listenTCP(t, w.outside, privateIP+":80")
	var c net.Conn
	must(t, g.ns.do(func() (err error) {
		c, err = net.DialTimeout("tcp4", privateIP+":80", patience)
		return err
	}))
	defer c.Close()
	peer, err := l.Accept()
	must(t, err)
	defer peer.Close()

	w.crash(t, n)
	n = w.open(t, nil)
	if got, err := n.Adopt(testenv.Context(t), s.Index, p); err != nil || got != s {
		t.Fatalf("adopted %+v, %v, want %+v", got, err, s)
	}
	must(t, n.Reclaim(testenv.Context(t), []int{s.Index}))
	must(t, c.SetDeadline(time.Now().Add(patience)))
	must(t, peer.SetDeadline(time.Now().Add(patience)))
	if _, err := c.Write([]byte("still here")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	k, err := peer.Read(buf)
	if err != nil || string(buf[:k]) != "still here" {
		t.Fatalf("read %q, %v", buf[:k], err)
	}
	refuses(t, g.ns, "tcp4", internetIP+":80")
}

// crash ends n as a kill of its process would.
func (w *world) crash(t testing.TB, n *Network) {
	t.Helper()
	n.closing.Lock()
	defer n.closing.Unlock()
	n.closed = true
	n.stop()
	n.work.Wait()
	must(t, n.host.close())
}

func TestAPolicyCanBeChanged(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	g := w.guest(t, n, s)
	serve(t, w.outside, "outside", internetIP+":80")
	serve(t, w.outside, "private", privateIP+":80")
	before := w.state(t)
	answers(t, g.ns, "tcp4", internetIP+":80", "outside sees "+hostPublic)
	must(t, n.SetPolicy(testenv.Context(t), s.Index, sandbox.Policy{Mode: sandbox.ModeNone, Allow: []string{privateIP + "/32"}}))
	refuses(t, g.ns, "tcp4", internetIP+":80")
	answers(t, g.ns, "tcp4", privateIP+":80", "private sees "+hostPublic)
	must(t, n.SetPolicy(testenv.Context(t), s.Index, internet()))
	answers(t, g.ns, "tcp4", internetIP+":80", "outside sees "+hostPublic)
	refuses(t, g.ns, "tcp4", privateIP+":80")
	must(t, n.Release(testenv.Context(t), s.Index))
	if err := n.SetPolicy(testenv.Context(t), s.Index, internet()); !fault.Is(err, fault.Precondition) {
		t.Errorf("of a free slot: %v", err)
	}
	if len(w.state(t)) >= len(before) {
		t.Errorf("left: %q", w.state(t))
	}
}

func TestAFlushedRulesetComesBackByItself(t *testing.T) {
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, sandbox.Policy{Mode: sandbox.ModeAllow, Allow: []string{"10.1.0.0/16"}})
	before := w.state(t)
	flushRules(t, w.host)
	ctx, cancel := context.WithTimeout(testenv.Context(t), patience)
	defer cancel()
	for {
		now, err := w.readState(t)
		if err == nil && slices.Equal(before, now) {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("the rules stay away: %q, %v, want %q", now, err, before)
		}
	}
	g := w.guest(t, n, s)
	serve(t, w.host, "host", "0.0.0.0:22")
	serve(t, w.outside, "outside", privateIP+":80")
	refuses(t, g.ns, "tcp4", hostPublic+":22")
	answers(t, g.ns, "tcp4", privateIP+":80", "outside sees "+hostPublic)
}
