package ports

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestHostileBindings: too many, junk, and what nobody may have.
func TestHostileBindings(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	junk := []Binding{
		{Protocol: "tcp", HostIP: "localhost", HostPort: 5000, ContainerPort: 1},
		{Protocol: "tcp", HostIP: "../../etc/passwd\x00\n" + strings.Repeat("x", 1000), HostPort: 5000, ContainerPort: 1},
		{Protocol: "tcp", HostIP: "fe80::1%lo", HostPort: 5000, ContainerPort: 1},
		{Protocol: "udp", HostIP: "224.0.0.1", HostPort: 5000, ContainerPort: 1},
		{Protocol: "udp", HostIP: "255.255.255.255", HostPort: 5000, ContainerPort: 1},
		{Protocol: "tcp", HostIP: "192.0.2.1", HostPort: 5000, ContainerPort: 1},
		{Protocol: "tcp", HostIP: "127.0.0.1", HostPort: 22, ContainerPort: 1},
		{Protocol: "sctp", HostPort: 5000, ContainerPort: 1},
		{Protocol: "tcp", HostPort: 5000},
		{},
	}
	w.tell(g, changed("junk", junk...), Event{Kind: Synced})
	w.tell(g, changed(strings.Repeat("x", maxOwnerID+1), tcpOn(5000)), changed("a\nb", tcpOn(5000)), changed("", tcpOn(5000)), removed("what"), Event{Kind: 77})
	if list := w.table.List(""); len(list) != 7 {
		t.Errorf("listed %+v", list)
	}
	for _, l := range w.table.List("") {
		if l.Addresses != nil || l.Problem == "" || strings.ContainsAny(l.HostIP+l.Problem, "\x00\n") || len(l.HostIP) > maxHostIP {
			t.Errorf("of junk became %+v", l)
		}
	}
	w.tell(g, removed("junk"))
	// The ports need not be free: what counts is how many there are.
	for i := range 40 {
		var many []Binding
		for j := range 100 {
			many = append(many, Binding{Protocol: "udp", HostIP: "127.0.0.1", HostPort: uint16(20000 + 100*i + j), ContainerPort: 1})
		}
		w.tell(g, changed(fmt.Sprint("many", i), many...))
	}
	w.tell(g, Event{Kind: 77})
	if n := len(w.table.List("")); n != MaxBindings {
		t.Errorf("%d bindings of one sandbox, at most %d are allowed", n, MaxBindings)
	}
}

// TestFlappingGuestIsPaced: what it tells is read at the pace that hutchd wants.
func TestFlappingGuestIsPaced(t *testing.T) {
	var p budget
	now := time.Now()
	if d := p.spend(burst, now); d != 0 {
		t.Errorf("waits %s for what is allowed at once", d)
	}
	if d := p.spend(rate, now); d < 900*time.Millisecond || d > 1100*time.Millisecond {
		t.Errorf("waits %s for the work of a second", d)
	}
	if d := p.spend(rate, now.Add(time.Minute)); d != 0 {
		t.Errorf("waits %s after a rest", d)
	}
}

// TestTooManyConnections are reset, and the next one after an end is served.
func TestTooManyConnections(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	w.tell(g, changed("c", tcpOn(p)))
	speaks(t, p, "web")
	var all []net.Conn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	eventually(t, func() error { return levelIs(w.inUse(g), 0) })
	for range MaxConns {
		c, err := net.Dial("tcp", at(p))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	eventually(t, func() error { return levelIs(w.inUse(g), MaxConns) })
	if _, err := answers(at(p)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one too many: %v, want a reset", err)
	}
	all[0].Close()
	speaks(t, p, "web")
}

// TestListenersAreBoundedOverAll, as descriptors are hutchd's own.
func TestListenersAreBoundedOverAll(t *testing.T) {
	w := newWorld(t)
	w.p.MaxListeners = 3
	w.open()
	one, two := w.run("one"), w.run("two")
	p := freeMany(t, 5)
	w.tell(one, changed("c", tcpOn(p[0]), tcpOn(p[1]), tcpOn(p[2]), tcpOn(p[3])), Event{Kind: Synced}, Event{Kind: Synced})
	w.tell(two, changed("c", tcpOn(p[4])), Event{Kind: Synced}, Event{Kind: Synced})
	open := 0
	for _, l := range w.table.List("") {
		open += len(l.Addresses)
	}
	if l := w.table.List("two"); open != 3 || !strings.Contains(l[0].Problem, "the most allowed") {
		t.Errorf("%d are open; %+v", open, l)
	}
}
