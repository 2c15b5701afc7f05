package identity

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// inNamespaces runs f on a thread with namespaces of its own. f must not call
// t.Fatal.
func inNamespaces(t *testing.T, flags int, f func()) {
	t.Helper()
	testenv.RequireRoot(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its namespaces
		if err := unix.Unshare(flags); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		f()
	}()
	<-done
}

// state is what is visible of an interface: addresses and default gateways.
func state(t *testing.T, name string) (addresses, gateways []string, attrs *netlink.LinkAttrs) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Errorf("link: %v", err)
		return nil, nil, &netlink.LinkAttrs{}
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Errorf("addresses: %v", err)
	}
	for _, a := range addrs {
		if !a.IP.IsLinkLocalUnicast() {
			addresses = append(addresses, a.IPNet.String())
		}
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Errorf("routes: %v", err)
	}
	for _, r := range routes {
		if r.Gw != nil {
			gateways = append(gateways, r.Gw.String())
		}
	}
	return addresses, gateways, link.Attrs()
}

func TestNetlinkLinks(t *testing.T) {
	inNamespaces(t, unix.CLONE_NEWNET, func() {
		links := NetlinkLinks()
		none := LinkParams{Name: "eth0"}
		if err := links.Apply(none); err != nil {
			t.Errorf("no interface, no address: %v", err)
		}
		first := LinkParams{
			Name: "eth0", MTU: 1400,
			Address: netip.MustParsePrefix("198.18.0.2/30"), Gateway: netip.MustParseAddr("198.18.0.1"),
		}
		if err := links.Apply(first); err == nil {
			t.Error("an address was given to an interface that is not there")
		}
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}
		if err := netlink.LinkAdd(pair); err != nil {
			t.Errorf("make eth0: %v", err)
			return
		}
		peer, err := netlink.LinkByName("peer")
		if err != nil || netlink.LinkSetUp(peer) != nil {
			t.Errorf("peer: %v", err)
			return
		}
		if err := links.Loopback(); err != nil {
			t.Errorf("loopback: %v", err)
		}
		if c, err := net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			t.Errorf("loopback does not work: %v", err)
		} else {
			c.Close()
		}
		second := LinkParams{Name: "eth0", Address: netip.MustParsePrefix("10.9.0.7/24"), Gateway: netip.MustParseAddr("10.9.0.1")}
		otherGate := second
		otherGate.Gateway = netip.MustParseAddr("10.9.0.2")
		six := LinkParams{Name: "eth0", Address: netip.MustParsePrefix("fd00::2/64"), Gateway: netip.MustParseAddr("fd00::1")}
		for _, step := range []struct {
			name     string
			params   LinkParams
			address  []string
			gateways []string
			mtu      int
		}{
			{"cold", first, []string{"198.18.0.2/30"}, []string{"198.18.0.1"}, 1400},
			{"again", first, []string{"198.18.0.2/30"}, []string{"198.18.0.1"}, 1400},
			{"restored elsewhere", second, []string{"10.9.0.7/24"}, []string{"10.9.0.1"}, 1400},
			{"another gateway", otherGate, []string{"10.9.0.7/24"}, []string{"10.9.0.2"}, 1400},
			{"IPv6", six, []string{"fd00::2/64"}, []string{"fd00::1"}, 1400},
			{"no network", none, nil, nil, 1400},
		} {
			if err := links.Apply(step.params); err != nil {
				t.Errorf("%s: %v", step.name, err)
				continue
			}
			addresses, gateways, attrs := state(t, "eth0")
			if !slices.Equal(addresses, step.address) || attrs.MTU != step.mtu || attrs.Flags&net.FlagUp == 0 {
				t.Errorf("%s: addresses %q, MTU %d, flags %v", step.name, addresses, attrs.MTU, attrs.Flags)
			}
			if !slices.Equal(gateways, step.gateways) {
				t.Errorf("%s: gateways %q, want %q", step.name, gateways, step.gateways)
			}
		}
	})
}

// TestLinkThatWasTouched configures interfaces that are down, as at a create,
// but not quite as the kernel made them.
func TestLinkThatWasTouched(t *testing.T) {
	want := LinkParams{Name: "eth0", Address: netip.MustParsePrefix("198.18.0.2/30")}
	for name, touch := range map[string]func(netlink.Link) error{
		"untouched": func(netlink.Link) error { return nil },
		"has an address": func(l netlink.Link) error {
			return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 1, 2, 3), Mask: net.CIDRMask(16, 32)}})
		},
		"was up": func(l netlink.Link) error {
			return errors.Join(netlink.LinkSetUp(l), netlink.LinkSetDown(l))
		},
	} {
		inNamespaces(t, unix.CLONE_NEWNET, func() {
			link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}
			if err := errors.Join(netlink.LinkAdd(link), touch(link), NetlinkLinks().Apply(want)); err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			addresses, gateways, attrs := state(t, "eth0")
			if !slices.Equal(addresses, []string{"198.18.0.2/30"}) || len(gateways) != 0 || attrs.Flags&net.FlagUp == 0 {
				t.Errorf("%s: addresses %q, gateways %q, flags %v", name, addresses, gateways, attrs.Flags)
			}
		})
	}
}

func TestSystemHostname(t *testing.T) {
	inNamespaces(t, unix.CLONE_NEWUTS, func() {
		k := System()
		for _, name := range []string{"sb-1", "sb-22"} {
			if err := k.SetHostname(name); err != nil {
				t.Errorf("set: %v", err)
			}
			if got, err := k.Hostname(); err != nil || got != name {
				t.Errorf("hostname = %q, %v; want %q", got, err, name)
			}
		}
		if release, err := k.Release(); err != nil || release == "" {
			t.Errorf("release = %q, %v", release, err)
		}
	})
}

// TestSystemEntropy gives the kernel good random bytes: it can only gain.
func TestSystemEntropy(t *testing.T) {
	testenv.RequireRoot(t)
	seed := make([]byte, 64)
	if _, err := rand.Read(seed); err != nil {
		t.Fatal(err)
	}
	if err := System().AddEntropy(seed); err != nil {
		t.Errorf("add entropy: %v", err)
	}
}

// TestBootIDThatProgramsSee covers the kernel's, in mounts of its own.
func TestBootIDThatProgramsSee(t *testing.T) {
	file := t.TempDir() + "/run/boot_id"
	real, err := os.ReadFile(bootIDPath)
	if err != nil {
		t.Fatal(err)
	}
	inNamespaces(t, unix.CLONE_NEWNS, func() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Errorf("keep mounts to ourselves: %v", err)
			return
		}
		mounts := func() int {
			b, err := os.ReadFile("/proc/thread-self/mountinfo")
			if err != nil {
				t.Error(err)
			}
			return strings.Count(string(b), bootIDPath)
		}
		for _, id := range []string{"0b3f1c52-6a9d-4e0f-8d21-5c7e9a1b2c3d", "ffffffff-6a9d-4e0f-8d21-5c7e9a1b2c3d"} {
			for range 2 {
				if err := coverBootID(file, bootIDPath, id); err != nil {
					t.Error(err)
				}
				if got, err := os.ReadFile(bootIDPath); err != nil || string(got) != id+"\n" {
					t.Errorf("programs read %q, %v", got, err)
				}
			}
		}
		if n := mounts(); n != 1 {
			t.Errorf("%d mounts", n)
		}
		if err := os.WriteFile(bootIDPath, []byte("x"), 0); !errors.Is(err, unix.EROFS) {
			t.Errorf("programs may write it: %v", err)
		}
	})
	if now, err := os.ReadFile(bootIDPath); err != nil || string(now) != string(real) {
		t.Errorf("outside it is %q now, %v; was %q", now, err, real)
	}
}

func TestPoolInfo(t *testing.T) {
	got := poolInfo([]byte{0xaa, 0xbb})
	little, _ := hex.DecodeString("1000000002000000aabb")
	big, _ := hex.DecodeString("0000001000000002aabb")
	if !bytes.Equal(got, little) && !bytes.Equal(got, big) {
		t.Errorf("pool info = %x", got)
	}
}

// TestWhatIsNotAsItWasIsSetAgain configures an interface that is up, after
// somebody has changed one thing about it.
func TestWhatIsNotAsItWasIsSetAgain(t *testing.T) {
	want := LinkParams{
		Name: "eth0", MTU: 1400,
		Address: netip.MustParsePrefix("198.18.0.2/30"), Gateway: netip.MustParseAddr("198.18.0.1"),
	}
	address := func(text string) *netlink.Addr {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for name, touch := range map[string]func(netlink.Link) error{
		"nothing":       func(netlink.Link) error { return nil },
		"more":          func(l netlink.Link) error { return netlink.AddrAdd(l, address("198.18.0.9/30")) },
		"another label": func(l netlink.Link) error { return netlink.AddrAdd(l, address("10.1.2.3/16 eth0:x")) },
		"none":          func(l netlink.Link) error { return netlink.AddrDel(l, address("198.18.0.2/30")) },
		"other prefix": func(l netlink.Link) error {
			return errors.Join(netlink.AddrDel(l, address("198.18.0.2/30")), netlink.AddrAdd(l, address("198.18.0.2/24")))
		},
		"MTU":  func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) },
		"down": netlink.LinkSetDown,
		"no route": func(l netlink.Link) error {
			return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetUp(l))
		},
	} {
		inNamespaces(t, unix.CLONE_NEWNET, func() {
			link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}
			links := NetlinkLinks()
			if err := errors.Join(netlink.LinkAdd(link), links.Apply(want), touch(link), links.Apply(want)); err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			addresses, gateways, attrs := state(t, "eth0")
			if !slices.Equal(addresses, []string{"198.18.0.2/30"}) || !slices.Equal(gateways, []string{"198.18.0.1"}) {
				t.Errorf("%s: addresses %q, gateways %q", name, addresses, gateways)
			}
			if attrs.MTU != 1400 || attrs.Flags&net.FlagUp == 0 {
				t.Errorf("%s: MTU %d, flags %v", name, attrs.MTU, attrs.Flags)
			}
		})
	}
}
