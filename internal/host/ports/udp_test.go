package ports

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net"
	"strconv"
	"testing"
	"time"
)

func udpOn(port uint16) Binding {
	return Binding{Protocol: "udp", HostIP: "127.0.0.1", HostPort: port, ContainerPort: 53}
}

// client sends from one socket to a port of the host.
func client(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// rally sends b and waits for it to come back; a datagram may be lost.
func rally(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	buf := make([]byte, 1<<16)
	eventually(t, func() error {
		if _, err := c.Write(b); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(buf)
		if err == nil && !bytes.Equal(buf[:n], b) {
			err = fmt.Errorf("%d other bytes came back", n)
		}
		return err
	})
}

func (w *world) udpServer(id string) (*guest, uint16) {
	w.t.Helper()
	g := w.table.p.Sandboxes.(*world).run("sb")
	p := free(w.t)
	g.udp[p] = w.echoUDP()
	w.tell(g, changed(id, udpOn(p)), Event{Kind: Synced})
	w.tell(g, Event{Kind: Synced})
	return g, p
}

func TestUDP(t *testing.T) {
	w := newWorld(t)
	w.open()
	_, p := w.udpServer("dns")
	for _, n := range []int{1, 512, 1472, 9000, 65507} {
		b := make([]byte, n)
		_, _ = rand.Read(b)
		rally(t, client(t, at(p)), b)
	}
}

// TestUDPFlowsAreKept: one client is one socket towards the server, another
// client is another, and an idle one ends, and with it the use of the sandbox.
func TestUDPFlowsAreKept(t *testing.T) {
	w := newWorld(t)
	w.p.flowIdle = 200 * time.Millisecond
	w.open()
	g, p := w.udpServer("dns")
	a, b := client(t, at(p)), client(t, at(p))
	for range 3 {
		rally(t, a, []byte("a"))
		rally(t, b, []byte("b"))
	}
	eventually(t, func() error { return levelIs(w.inUse(g), 2) })
	eventually(t, func() error { return levelIs(w.inUse(g), 0) })
	rally(t, a, []byte("again"))
	w.tell(g, removed("dns"))
	eventually(t, func() error { return levelIs(w.inUse(g), 0) })
}

// TestUDPClientsMakeRoom for each other once they are not busy.
func TestUDPClientsMakeRoom(t *testing.T) {
	w := newWorld(t)
	w.open()
	g, p := w.udpServer("dns")
	for range MaxFlows {
		rally(t, client(t, at(p)), []byte("x"))
	}
	rally(t, client(t, at(p)), []byte("one more")) // waits until one was unused for 2 s
	if n := w.inUse(g); n > MaxFlows {
		t.Errorf("%d flows, at most %d are allowed", n, MaxFlows)
	}
}

func TestUDPOverIPv6(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.udp[p] = w.echoUDP()
	b := udpOn(p)
	b.HostIP = "::"
	w.tell(g, changed("c", b), Event{Kind: Synced})
	rally(t, client(t, net.JoinHostPort("::1", strconv.Itoa(int(p)))), []byte("six"))
}
