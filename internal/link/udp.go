package link

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// DialLocalUDP returns a UDP socket that is connected to a port of this
// machine, at the address at which a program on it would be answered: where a
// socket is bound to the port, else at the machine's own address, behind which
// the kernel may pass datagrams on. That nothing listens there is no error.
func DialLocalUDP(ctx context.Context, port uint16) (*net.UDPConn, error) {
	addr, ok := boundAddress(port)
	if !ok {
		addr = ownAddress()
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", netip.AddrPortFrom(addr, port).String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// ownAddress returns the first address of this machine that is not loopback's,
// loopback's when it has no other.
func ownAddress() netip.Addr {
	for _, s := range localAddresses() {
		if a, err := netip.ParseAddr(s); err == nil && !a.IsLoopback() {
			return a
		}
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// boundAddress returns where UDP sockets that are bound to port can be reached.
func boundAddress(port uint16) (netip.Addr, bool) {
	var found []netip.Addr
	for _, file := range []string{"/proc/net/udp", "/proc/net/udp6"} {
		f, err := os.Open(file)
		if err != nil {
			continue // no IPv6
		}
		found = append(found, boundIn(f, port)...)
		_ = f.Close()
	}
	for _, a := range found {
		if a.Is4() && (a.IsUnspecified() || a.IsLoopback()) {
			return reachable(a), true
		}
	}
	if len(found) == 0 {
		return netip.Addr{}, false
	}
	return reachable(found[0]), true
}

// reachable is a, or loopback for every address.
func reachable(a netip.Addr) netip.Addr {
	switch {
	case !a.IsUnspecified():
		return a
	case a.Is4():
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// boundIn reads a table of /proc/net for the addresses at which sockets are
// bound to port, those of connections left out.
func boundIn(table io.Reader, port uint16) []netip.Addr {
	const unconnected = "07"
	var found []netip.Addr
	for lines := bufio.NewScanner(table); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 4 || f[3] != unconnected {
			continue
		}
		address, number, _ := strings.Cut(f[1], ":")
		n, err := strconv.ParseUint(number, 16, 16)
		if err != nil || uint16(n) != port {
			continue
		}
		if a, ok := tableAddress(address); ok {
			found = append(found, a)
		}
	}
	return found
}

// tableAddress reads an address as /proc/net writes it: words of four bytes in
// the byte order of the machine.
func tableAddress(s string) (netip.Addr, bool) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b)%4 != 0 {
		return netip.Addr{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	return netip.AddrFromSlice(b)
}

// carryDatagrams carries datagrams between s and a connected UDP socket until
// the host ends the flow.
func carryDatagrams(buffers *sync.Pool) func(*Stream, net.Conn) {
	return func(s *Stream, c net.Conn) {
		var out sync.WaitGroup
		out.Go(func() {
			err := datagramsOut(s, c.(syscall.Conn), buffers)
			if err != nil {
				abort(s)
			}
			_ = c.Close()
		})
		in := datagramReader{r: s}
		for {
			b, err := in.next()
			if err != nil {
				break
			}
			// What can't be sent is lost; that nobody listens is told by reading.
			if _, err := c.Write(b); errors.Is(err, net.ErrClosed) {
				break
			}
		}
		_ = c.Close()
		out.Wait()
	}
}

// datagramsOut sends what comes from c to the host until c is closed.
func datagramsOut(s *Stream, c syscall.Conn, buffers *sync.Pool) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	for {
		b, n, err := receive(raw, buffers)
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case slices.ContainsFunc([]error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH}, func(e error) bool { return errors.Is(err, e) }):
			continue // of a datagram sent before; the next one may be heard
		case err != nil:
			return err
		}
		binary.BigEndian.PutUint16(*b, uint16(n))
		_, err = s.Write((*b)[:2+n])
		buffers.Put(b)
		if err != nil {
			return err
		}
	}
}

// receive waits for a datagram, and only then takes a buffer for it: most flows
// are quiet most of the time, and the agent is small. The datagram stands in
// the n bytes behind the first two.
func receive(raw syscall.RawConn, buffers *sync.Pool) (b *[]byte, n int, err error) {
	waitErr := raw.Read(func(fd uintptr) bool {
		b, _ = buffers.Get().(*[]byte)
		if b == nil {
			fresh := make([]byte, 2+maxDatagram)
			b = &fresh
		}
		for {
			n, err = syscall.Read(int(fd), (*b)[2:])
			if err != syscall.EINTR {
				break
			}
		}
		if err != nil {
			buffers.Put(b)
		}
		return err != syscall.EAGAIN
	})
	if waitErr != nil {
		return nil, 0, waitErr
	}
	return b, n, err
}
