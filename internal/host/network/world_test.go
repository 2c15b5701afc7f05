package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// The outside of the test's world. Everything in it is one namespace that
// answers for all these addresses.
const (
	hostPublic  = "203.0.113.1"
	hostPrivate = "192.168.50.1"
	outsideIP   = "203.0.113.2"
	internetIP  = "8.8.8.8"
	privateIP   = "10.1.2.3"
	resolverIP  = "10.255.255.53"
	metadataIP  = "169.254.169.254"
)

// world is a private host with an outside, made of network namespaces.
type world struct {
	t       testing.TB
	dir     string
	host    *namespace
	outside *namespace
	hostNS  string // path
}

func newNS(t testing.TB, path string, setup func(*netlink.Handle) error) *namespace {
	t.Helper()
	err := makeNamespace(path, func() error {
		// New namespaces begin with the settings of the machine, whatever they are.
		if err := apply([]setting{{path: "ipv4/ip_forward", value: "0"}}); err != nil {
			return err
		}
		return withRoutes(func(h *netlink.Handle) error {
			lo, err := h.LinkByName("lo")
			if err != nil {
				return err
			}
			if err := h.LinkSetUp(lo); err != nil || setup == nil {
				return err
			}
			return setup(h)
		})
	})
	t.Cleanup(func() {
		if err := removeNamespace(path); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	ns, err := openNamespace(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.close() })
	return ns
}

func addr(t testing.TB, h *netlink.Handle, link, prefix string) error {
	t.Helper()
	l, err := h.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	if err := h.AddrAdd(l, a); err != nil {
		return fmt.Errorf("%s on %s: %w", prefix, link, err)
	}
	return h.LinkSetUp(l)
}

func defaultVia(h *netlink.Handle, gw string) error {
	return h.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)})
}

func newWorld(t testing.TB) *world {
	t.Helper()
	testenv.RequireRoot(t)
	w := &world{t: t, dir: t.TempDir()}
	w.hostNS = filepath.Join(w.dir, "host")
	w.outside = newNS(t, filepath.Join(w.dir, "outside"), func(h *netlink.Handle) error {
		for _, a := range []string{internetIP, privateIP, resolverIP, metadataIP} {
			if err := addr(t, h, "lo", a+"/32"); err != nil {
				return err
			}
		}
		return nil
	})
	w.host = newNS(t, w.hostNS, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wan0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "wan0", netlink.NsFd(w.outside.file.Fd())
		return errors.Join(h.LinkAdd(veth), addr(t, h, "wan0", hostPublic+"/24"), addr(t, h, "wan0", hostPrivate+"/24"))
	})
	must(t, w.outside.do(func() error {
		return withRoutes(func(h *netlink.Handle) error { return addr(t, h, "wan0", outsideIP+"/24") })
	}))
	must(t, w.host.do(func() error {
		return withRoutes(func(h *netlink.Handle) error { return defaultVia(h, outsideIP) })
	}))
	for _, ns := range []*namespace{w.host, w.outside} {
		must(t, ns.do(func() error {
			events, err := nl.Dial(unix.NETLINK_ROUTE, &nl.Config{Groups: unix.RTMGRP_LINK})
			if err != nil {
				return err
			}
			defer events.Close()
			return waitUp(testenv.Context(t), events, "wan0")
		}))
	}
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a Network of this world; it is closed when the test ends.
func (w *world) open(t testing.TB, change func(*Params)) *Network {
	t.Helper()
	p := Params{
		Root: filepath.Join(w.dir, "root"), Dir: filepath.Join(w.dir, "netns"), HostNetns: w.hostNS,
		Resolvers: []netip.Addr{netip.MustParseAddr(resolverIP)},
		Logger:    slog.New(slog.NewTextHandler(logWriter{t}, nil)),
	}
	if change != nil {
		change(&p)
	}
	n, err := Open(testenv.Context(t), p)
	must(t, err)
	t.Cleanup(func() { w.shut(t, n) })
	return n
}

// shut releases every slot of n and closes it, unless it is closed already.
func (w *world) shut(t testing.TB, n *Network) {
	t.Helper()
	n.closing.Lock()
	closed := n.closed
	n.closing.Unlock()
	if closed {
		return
	}
	n.after = nil
	there, err := n.found()
	must(t, err)
	for index := range there {
		if err := n.Release(context.Background(), index); err != nil {
			t.Error(err)
		}
	}
	if err := n.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func acquire(t testing.TB, n *Network, p sandbox.Policy) Slot {
	t.Helper()
	s, err := n.Acquire(testenv.Context(t), p)
	must(t, err)
	return s
}

func internet() sandbox.Policy { return sandbox.Policy{Mode: sandbox.ModeInternet} }

// state lists all that slots leave on the host: links, routes, tables with
// their elements, namespaces, and flows.
func (w *world) state(t testing.TB) []string {
	t.Helper()
	out, err := w.readState(t)
	must(t, err)
	return out
}

// readState is state. It fails when the rules change meanwhile.
func (w *world) readState(t testing.TB) (out []string, err error) {
	t.Helper()
	err = w.host.do(func() error {
		err := withRoutes(func(h *netlink.Handle) error {
			links, err := dump(h.LinkList)
			for _, l := range links {
				out = append(out, "link "+l.Attrs().Name)
			}
			if err != nil {
				return err
			}
			routes, err := dump(func() ([]netlink.Route, error) {
				return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, 0)
			})
			for _, r := range routes {
				out = append(out, fmt.Sprintf("route %v link %d", r.Dst, r.LinkIndex))
			}
			return err
		})
		if err != nil {
			return err
		}
		return withNft(func(c *nftables.Conn) error {
			tables, err := c.ListTables()
			if err != nil {
				return err
			}
			for _, table := range tables {
				out = append(out, "table "+table.Name)
				for _, s := range markSets() {
					s.Table = table
					elements, err := c.GetSetElements(s)
					if err != nil {
						return err
					}
					for _, e := range elements {
						out = append(out, fmt.Sprintf("element %s %q", s.Name, e.Key))
					}
				}
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	for _, f := range w.flows(t) {
		if strings.Contains(f, "198.19.") {
			out = append(out, "flow "+f)
		}
	}
	files, err := os.ReadDir(filepath.Join(w.dir, "netns"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != forwardingFile {
			out = append(out, "namespace "+f.Name())
		}
	}
	slices.Sort(out)
	return out, nil
}

func (w *world) flows(t testing.TB) []string {
	t.Helper()
	var out []string
	must(t, w.host.do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer h.Close()
		flows, err := dump(func() ([]*netlink.ConntrackFlow, error) {
			return h.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		})
		for _, f := range flows {
			out = append(out, f.String())
		}
		return err
	}))
	return out
}

// guest is a namespace that stands for a virtual machine: its tap is connected
// to the slot's tap by copying frames, as a VMM does.
type guest struct {
	ns *namespace
}

func (w *world) guest(t testing.TB, n *Network, s Slot) *guest {
	t.Helper()
	var tap *os.File
	ns := newNS(t, filepath.Join(w.dir, fmt.Sprintf("guest-%s", filepath.Base(s.Netns))), func(h *netlink.Handle) (err error) {
		if tap, err = attachTap(); err != nil {
			return err
		}
		l, err := h.LinkByName(tapName)
		if err != nil {
			return err
		}
		if err := h.LinkSetHardwareAddr(l, mac(GuestMAC)); err != nil {
			return err
		}
		return errors.Join(addr(t, h, tapName, GuestAddr), defaultVia(h, GatewayIP))
	})
	slotTap, err := n.OpenTap(testenv.Context(t), s)
	must(t, err)
	var both sync.WaitGroup
	for _, way := range [][2]*os.File{{tap, slotTap}, {slotTap, tap}} {
		both.Go(func() { copyFrames(way[0], way[1]) })
	}
	t.Cleanup(func() {
		tap.Close()
		slotTap.Close()
		both.Wait()
	})
	return &guest{ns}
}

// oneGuest is a world with one sandbox that has the default policy.
func oneGuest(t testing.TB) (*world, *Network, Slot, *guest) {
	t.Helper()
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	return w, n, s, w.guest(t, n, s)
}

// copyFrames copies until either end is closed. Frames that the other side
// can't take now are lost, as on a wire.
func copyFrames(from, to *os.File) {
	buf := make([]byte, 1<<16+64)
	for {
		n, err := from.Read(buf)
		if errors.Is(err, unix.EIO) { // the interface is not up yet
			continue
		}
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}

// serve answers on TCP and UDP port of addr in ns: whoever connects is told
// the name and the address that it comes from.
func serve(t testing.TB, ns *namespace, name, address string) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	must(t, ns.do(func() (err error) {
		if l, err = net.Listen("tcp4", address); err != nil {
			return err
		}
		p, err = net.ListenPacket("udp4", address)
		return err
	}))
	var both sync.WaitGroup
	both.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprintf(c, "%s sees %s", name, host)
			c.Close()
		}
	})
	both.Go(func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			p.WriteTo(fmt.Appendf(nil, "%s sees %s", name, host), from)
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.Close()
		both.Wait()
	})
}

// patience is how long a test waits for an answer that has to come. A refusal
// has to come as well: a packet dropped without a word makes an ask time out.
const patience = 10 * time.Second

// ask asks address from inside ns and returns the answer.
func ask(ns *namespace, network, address string) (string, error) {
	var answer string
	err := ns.do(func() error {
		c, err := net.DialTimeout(network, address, patience)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if network == "udp4" {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			buf := make([]byte, 2048)
			n, err := c.Read(buf)
			answer = string(buf[:n])
			return err
		}
		b, err := io.ReadAll(c)
		answer = string(b)
		return err
	})
	return answer, err
}

// answers fails the test unless address answers with want.
func answers(t testing.TB, ns *namespace, network, address, want string) {
	t.Helper()
	got, err := ask(ns, network, address)
	if err != nil {
		t.Errorf("%s %s does not answer: %v", network, address, err)
	} else if got != want {
		t.Errorf("%s %s answers %q, want %q", network, address, got, want)
	}
}

// refuses fails the test unless address is refused, and not just silent.
func refuses(t testing.TB, ns *namespace, network, address string) {
	t.Helper()
	got, err := ask(ns, network, address)
	var timeout net.Error
	switch {
	case err == nil:
		t.Errorf("%s %s answers %q, it should be refused", network, address, got)
	case errors.As(err, &timeout) && timeout.Timeout():
		t.Errorf("%s %s is silent, it should be refused: %v", network, address, err)
	}
}
