package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// The addresses of the world: documentation ranges, which hutch takes for
// public ones. The last ones are there too, so that nothing but the policy
// keeps a guest from them.
const (
	hostPublic  = "203.0.113.1"
	routerIP    = "203.0.113.2"
	resolverIP  = "203.0.113.53"
	webIP       = "203.0.113.80"
	farIP       = "198.51.100.7"
	privateIP   = "10.1.2.3"
	lanIP       = "192.168.7.7"
	dockerIP    = "172.16.1.1"
	carrierIP   = "100.64.0.9"
	metadataIP  = "169.254.169.254"
	hostPrivate = "192.168.50.1"
	worldPort   = "80"
)

// namespace is a network namespace, alive while the test process is or
// something runs inside.
type namespace struct{ file *os.File }

// path names it to other processes.
func (n namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// onThread runs f on a thread that comes home after it, or ends.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return
		}
		defer home.Close()
		err = f()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

func (n namespace) do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

func newNamespace(t *testing.T) namespace {
	t.Helper()
	var n namespace
	err := onThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() { n.file.Close() })
	return n
}

// up gives a link addresses and puts it up.
func up(link string, addresses ...string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		parsed, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, parsed); err != nil {
			return fmt.Errorf("%s on %s: %w", a, link, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// world is a host of its own and an internet, joined by a wire. Nothing of it
// reaches beyond this machine.
type world struct{ host, internet namespace }

// newWorld makes a world in which servers answer at all its addresses, on TCP
// and UDP, and a resolver knows these names:
//
//	web.example     webIP
//	large.example   webIP and farIP, by TCP only
func newWorld(t *testing.T) world {
	t.Helper()
	testenv.RequireRoot(t)
	w := world{newNamespace(t), newNamespace(t)}
	err := w.host.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wan0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "wan0", netlink.NsFd(w.internet.file.Fd())
		return errors.Join(netlink.LinkAdd(veth), up("lo"), up("wan0", hostPublic+"/24", hostPrivate+"/24"))
	})
	if err != nil {
		t.Fatalf("make the host's side: %v", err)
	}
	err = w.internet.do(func() error {
		elsewhere := []string{farIP + "/32", privateIP + "/32", lanIP + "/32", dockerIP + "/32", carrierIP + "/32", metadataIP + "/32"}
		return errors.Join(up("lo", elsewhere...), up("wan0", routerIP+"/24", resolverIP+"/24", webIP+"/24"))
	})
	if err != nil {
		t.Fatalf("make the internet's side: %v", err)
	}
	if err := w.host.do(func() error { return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(routerIP)}) }); err != nil {
		t.Fatalf("make the default route: %v", err)
	}
	for _, ip := range []string{webIP, farIP, privateIP, lanIP, dockerIP, carrierIP, metadataIP} {
		w.internet.serve(t, net.JoinHostPort(ip, worldPort), tellCaller)
	}
	w.host.serve(t, net.JoinHostPort("0.0.0.0", worldPort), tellCaller)
	w.internet.serve(t, net.JoinHostPort(resolverIP, "53"), answer)
	return w
}

// tellCaller tells a caller where it is seen to come from.
func tellCaller(_ []byte, from netip.AddrPort, _ string) []byte {
	return []byte("you are " + from.Addr().Unmap().String())
}

// serve answers what comes to address, one answer a connection or datagram,
// until the test ends.
func (n namespace) serve(t *testing.T, address string, reply func(ask []byte, from netip.AddrPort, network string) []byte) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	err := n.do(func() (err error) {
		if l, err = net.Listen("tcp4", address); err != nil {
			return err
		}
		p, err = net.ListenPacket("udp4", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var both sync.WaitGroup
	both.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 2048)
			if n, err := c.Read(buf); err == nil {
				c.Write(reply(buf[:n], netip.MustParseAddrPort(c.RemoteAddr().String()), "tcp"))
			}
			c.Close()
		}
	})
	both.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			p.WriteTo(reply(buf[:n], netip.MustParseAddrPort(from.String()), "udp"), from)
		}
	})
	t.Cleanup(func() { l.Close(); p.Close(); both.Wait() })
}

// answer is the resolver. Over TCP two bytes of length come first.
func answer(ask []byte, _ netip.AddrPort, network string) []byte {
	if network == "tcp" {
		ask = ask[min(2, len(ask)):]
	}
	var m dnsmessage.Message
	if err := m.Unpack(ask); err != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	known := map[string][]string{"web.example.": {webIP}, "large.example.": {webIP, farIP}}
	m.Header = dnsmessage.Header{ID: m.ID, Response: true, RecursionDesired: true, RecursionAvailable: true}
	m.Additionals = nil
	ips, ok := known[q.Name.String()]
	switch {
	case !ok:
		m.RCode = dnsmessage.RCodeNameError
	case len(ips) > 1 && network == "udp":
		m.Truncated = true
	case q.Type == dnsmessage.TypeA:
		for _, ip := range ips {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(ip).As4()},
			})
		}
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	if network == "tcp" {
		b = append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
	}
	return b
}

// putInside copies the program inside, built by buildInside, into a sandbox.
func putInside(t *testing.T, d *harness.Daemon, id, program string) {
	t.Helper()
	d.Hutch("cp", program, id+":/bin/inside")
}

// buildInside builds the program inside and returns its path.
func buildInside(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "inside")
	c := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./test/e2e/inside")
	c.Dir, c.Env = harness.Repo(t), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build inside: %v: %s", err, out)
	}
	return path
}
