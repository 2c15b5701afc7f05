package network

import (
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// vnetHeader is the virtio-net header before every frame: nothing offloaded.
const vnetHeader = 10

func frame(etherType uint16, srcMAC string, body []byte) []byte {
	f := make([]byte, vnetHeader)
	f = append(f, mac(TapMAC)...)
	f = append(f, mac(srcMAC)...)
	f = binary.BigEndian.AppendUint16(f, etherType)
	return append(f, body...)
}

func arpRequest(srcMAC string, from, about netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	b = append(b, mac(srcMAC)...)
	b = append(b, from.AsSlice()...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	b = append(b, about.AsSlice()...)
	return frame(unix.ETH_P_ARP, GuestMAC, b)
}

// udpPacket is an empty one from port to port 9.
func udpPacket(srcMAC string, port uint16, from, to netip.Addr) []byte {
	p := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	p = append(p, from.AsSlice()...)
	p = append(p, to.AsSlice()...)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
	p = binary.BigEndian.AppendUint16(p, port)
	return frame(unix.ETH_P_IP, srcMAC, append(p, 0, 9, 0, 8, 0, 0))
}

// bareTap is a world with one sandbox whose frames the test makes by itself.
func bareTap(t *testing.T) (*world, *Network, Slot, *os.File) {
	t.Helper()
	w := newWorld(t)
	n := w.open(t, nil)
	s := acquire(t, n, internet())
	tap, err := n.OpenTap(testenv.Context(t), s)
	must(t, err)
	t.Cleanup(func() { tap.Close() })
	return w, n, s, tap
}

// nextFrame reads frames until one fits.
func nextFrame(t *testing.T, tap *os.File, fits func(etherType uint16, body []byte) bool) {
	t.Helper()
	must(t, tap.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 1<<16)
	for {
		n, err := tap.Read(buf)
		must(t, err)
		if f := buf[vnetHeader:n]; len(f) > 14 && fits(binary.BigEndian.Uint16(f[12:]), f[14:]) {
			return
		}
	}
}

func TestAGuestTeachesTheSlotNoNeighbourAndLearnsOnlyTheGateway(t *testing.T) {
	_, n, s, tap := bareTap(t)
	gateway := netip.MustParseAddr(GatewayIP)
	for i := range 50 {
		for _, f := range [][]byte{
			arpRequest(GuestMAC, offset("198.18.77.0", i), gateway),
			arpRequest("02:00:00:00:00:99", offset("198.18.78.0", i), gateway),
			arpRequest("02:00:00:00:00:99", netip.MustParseAddr(guestIP), gateway),
		} {
			_, err := tap.Write(f)
			must(t, err)
		}
	}
	for _, about := range []netip.Addr{s.HostIP, vethIPOf(s.Index), gateway} {
		_, err := tap.Write(arpRequest(GuestMAC, netip.MustParseAddr(guestIP), about))
		must(t, err)
	}
	nextFrame(t, tap, func(etherType uint16, body []byte) bool {
		if etherType != unix.ETH_P_ARP || body[7] != 2 {
			return false
		}
		if to := body[24:28]; !slices.Equal(to, netip.MustParseAddr(guestIP).AsSlice()) {
			t.Errorf("a question from %v was answered", to)
		}
		if about := body[14:18]; !slices.Equal(about, gateway.AsSlice()) {
			t.Errorf("the slot tells the guest of %v", about)
			return false
		}
		return true
	})
	must(t, n.inside(s.Index, func() error {
		return withRoutes(func(h *netlink.Handle) error {
			neighbours, err := h.NeighList(0, netlink.FAMILY_V4)
			for _, nb := range neighbours {
				if nb.State != netlink.NUD_PERMANENT && nb.State != netlink.NUD_NOARP {
					t.Errorf("the slot learned a neighbour: %v", nb)
				}
			}
			return err
		})
	}))
}

func TestAddressesThatTheKernelDropsSilentlyAreRefusedToo(t *testing.T) {
	_, _, _, tap := bareTap(t)
	for _, to := range []string{"127.0.0.1", "0.1.2.3", "240.1.2.3"} {
		_, err := tap.Write(udpPacket(GuestMAC, 12345, netip.MustParseAddr(guestIP), netip.MustParseAddr(to)))
		must(t, err)
		// Destination unreachable, administratively prohibited.
		nextFrame(t, tap, func(etherType uint16, body []byte) bool {
			return etherType == unix.ETH_P_IP && body[9] == unix.IPPROTO_ICMP && body[20] == 3 && body[21] == 13 &&
				slices.Equal(body[20+8+16:20+8+20], netip.MustParseAddr(to).AsSlice())
		})
	}
}

func TestFramesWithAnotherSourceAreDropped(t *testing.T) {
	w, _, s, tap := bareTap(t)
	heard := listenUDP(t, w.outside, internetIP+":9")
	guest, internet := netip.MustParseAddr(guestIP), netip.MustParseAddr(internetIP)
	for _, f := range [][]byte{
		udpPacket("02:00:00:00:00:99", 1001, guest, internet),
		udpPacket(GuestMAC, 1002, netip.MustParseAddr("198.18.0.99"), internet),
		udpPacket(GuestMAC, 1003, s.HostIP, internet),
		udpPacket(GuestMAC, 1004, netip.MustParseAddr(hostPublic), internet),
		udpPacket(GuestMAC, 1005, guest, internet),
	} {
		_, err := tap.Write(f)
		must(t, err)
	}
	must(t, heard.SetReadDeadline(time.Now().Add(patience)))
	_, from, err := heard.ReadFrom(make([]byte, 100))
	must(t, err)
	if got, want := from.String(), hostPublic+":1005"; got != want {
		t.Errorf("heard %s first, want %s", got, want)
	}
}
