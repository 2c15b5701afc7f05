package ports

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

func TestPublishedPortAnswersAndEnds(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	w.tell(g, changed("c1", tcpOn(p)), Event{Kind: Synced})
	speaks(t, p, "web")
	want := []Published{{
		Sandbox: "sb", Owner: "c1", Name: "the c1", Binding: tcpOn(p), Port: p,
		Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
	}}
	if d := cmp.Diff(want, w.table.List("sb"), cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Errorf("listed (-want +got):\n%s", d)
	}
	if l := w.table.List("other"); l != nil {
		t.Errorf("listed for another sandbox: %v", l)
	}
	w.tell(g, removed("c1"))
	closed(t, p)
	eventually(t, func() error {
		if n := w.inUse(g); n != 0 {
			return fmt.Errorf("%d uses are left", n)
		}
		return nil
	})
}

// TestConnectionsKeepHalvesApart and hold the sandbox in use.
func TestConnectionsKeepHalvesApart(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	w.tell(g, changed("c", tcpOn(p)))
	speaks(t, p, "web")
	eventually(t, func() error { return levelIs(w.inUse(g), 0) })

	c, err := net.Dial("tcp", at(p))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, func() error { return levelIs(w.inUse(g), 1) })
	sent := make([]byte, 1<<20)
	go func() {
		_, _ = c.Write(sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || len(got) != len("web\n")+len(sent) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	eventually(t, func() error { return levelIs(w.inUse(g), 0) })
}

// TestABreakIsNoEnd: a server that resets must not look like one that has said
// all.
func TestABreakIsNoEnd(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g.tcp[p] = l.Addr().String()
	w.tell(g, changed("c", tcpOn(p)), Event{Kind: Synced})
	var c net.Conn
	eventually(t, func() error {
		c, err = net.Dial("tcp", at(p))
		return err
	})
	defer c.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(server, "half of")
	if _, err := io.ReadFull(c, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	abort(server)
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read on: %v, want a reset", err)
	}
}

func levelIs(got, want int) error {
	if got != want {
		return fmt.Errorf("level is %d, want %d", got, want)
	}
	return nil
}

// TestContainersSwapAPort: stop A, start B, remove A, in every order in which
// that may be told.
func TestContainersSwapAPort(t *testing.T) {
	p := uint16(0)
	a, b := func() Event { return changed("a", tcpOn(p)) }, func() Event { return changed("b", tcpOn(p)) }
	for name, events := range map[string]func() []Event{
		"in order":           func() []Event { return []Event{removed("a"), b(), removed("a")} },
		"B before A's end":   func() []Event { return []Event{b(), removed("a"), removed("a")} },
		"A's end told twice": func() []Event { return []Event{removed("a"), removed("a"), b()} },
		"A comes back":       func() []Event { return []Event{removed("a"), b(), removed("b"), a(), removed("a"), b(), removed("a")} },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.open()
			g := w.run("sb")
			p = free(t)
			g.tcp[p] = w.echo("web")
			w.tell(g, a())
			w.tell(g, events()...)
			w.tell(g, Event{Kind: Synced})
			w.tell(g, b())
			speaks(t, p, "web")
			if list := w.table.List(""); len(list) != 1 || list[0].Owner != "b" || list[0].Problem != "" {
				t.Errorf("listed %+v", list)
			}
		})
	}
}

// TestTakenPort is told, and had as soon as it is free.
func TestTakenPort(t *testing.T) {
	w := newWorld(t)
	w.open()
	p := free(t)
	other, err := net.Listen("tcp", at(p))
	if err != nil {
		t.Fatal(err)
	}
	g := w.run("sb")
	g.tcp[p] = w.echo("web")
	w.tell(g, changed("c", tcpOn(p)))
	w.problem("address already in use")
	other.Close()
	speaks(t, p, "web")
	w.problem("")
	w.table.mu.Lock()
	defer w.table.mu.Unlock()
	if w.table.timer != nil {
		t.Error("a timer goes on though nothing waits")
	}
}

// TestTwoSandboxesWantOnePort: the second gets it when the first has ended, at
// once.
func TestTwoSandboxesWantOnePort(t *testing.T) {
	w := newWorld(t)
	w.p.retryEvery = time.Hour
	w.open()
	p := free(t)
	one, two := w.run("one"), w.run("two")
	one.tcp[p], two.tcp[p] = w.echo("one"), w.echo("two")
	w.tell(one, changed("c", tcpOn(p)))
	speaks(t, p, "one")
	w.tell(two, changed("c", tcpOn(p)))
	eventually(t, func() error {
		if l := w.table.List("two"); len(l) != 1 || l[0].Problem != fmt.Sprintf("listen tcp4 127.0.0.1:%d: bind: address already in use (the c of sandbox one)", p) {
			return fmt.Errorf("listed %+v", l)
		}
		return nil
	})
	w.table.State("one", sandbox.Destroying)
	speaks(t, p, "two")
}

func TestDestroyCutsConnectionsOff(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	w.tell(g, changed("c", tcpOn(p)))
	speaks(t, p, "web")
	c, err := net.Dial("tcp", at(p))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Read(make([]byte, 4))
	w.table.State("sb", sandbox.Destroying)
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
	closed(t, p)
}

func TestRangeOfPorts(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	server := w.echo("web")
	var all []Binding
	for _, p := range freeMany(t, 100) {
		g.tcp[p] = server
		all = append(all, tcpOn(p))
	}
	w.tell(g, changed("c", all...))
	for _, b := range all {
		speaks(t, b.HostPort, "web")
	}
	w.tell(g, changed("c", all[:50]...))
	speaks(t, all[49].HostPort, "web")
	for _, b := range all[50:] {
		closed(t, b.HostPort)
	}
}

// TestTwins: docker lists a port of every address twice, for IPv4 and IPv6.
func TestTwins(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	v4, v6 := tcpOn(p), tcpOn(p)
	v4.HostIP, v6.HostIP = "0.0.0.0", "::"
	w.tell(g, changed("c", v4, v6))
	speaks(t, p, "web")
	if got, err := answers(fmt.Sprintf("[::1]:%d", p)); err != nil || got != "web" {
		t.Errorf("over IPv6: %q, %v", got, err)
	}
	w.problem("opened on loopback only")
	// Which shares its port with a binding of the same owner.
	w.tell(g, changed("c", v4, v6, tcpOn(p)))
	eventually(t, func() error {
		for _, l := range w.table.List("") {
			if len(l.Addresses) != 1 {
				return fmt.Errorf("not open: %+v", l)
			}
		}
		return levelIs(len(w.table.List("")), 3)
	})
	w.tell(g, changed("c", tcpOn(p)))
	eventually(t, func() error { return levelIs(len(w.table.List("")), 1) })
	speaks(t, p, "web")
}

// TestStatesOfASandbox: which keep what is open.
func TestStatesOfASandbox(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	w.tell(g, changed("c", tcpOn(p)))
	speaks(t, p, "web")
	for _, s := range []sandbox.State{sandbox.Paused, sandbox.Hibernated, sandbox.Pending} {
		w.table.State("sb", s)
		speaks(t, p, "web") // the fake's Use resumes it
	}
	w.mu.Lock()
	g.runs = false
	w.mu.Unlock()
	if _, err := answers(at(p)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a sandbox that is not resumed: %v, want a reset", err)
	}
	w.table.State("sb", sandbox.Stopped)
	closed(t, p)
}

// TestStreamBreaksOff: what the next one does not tell is no more, and what it
// does was never closed.
func TestStreamBreaksOff(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	two := freeMany(t, 2)
	stays, goes := two[0], two[1]
	g.tcp[stays], g.tcp[goes] = w.echo("stays"), w.echo("goes")
	w.tell(g, changed("s", tcpOn(stays)), changed("g", tcpOn(goes)), Event{Kind: Synced})
	speaks(t, goes, "goes")
	w.breakOff(g)
	speaks(t, goes, "goes")
	w.tell(g, changed("s", tcpOn(stays)))
	speaks(t, goes, "goes")
	w.tell(g, Event{Kind: Synced})
	closed(t, goes)
	speaks(t, stays, "stays")
}

// TestRestart: a new table has all open before any guest told of it, and the
// same numbers.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p], g.tcp[6443] = w.echo("web"), w.echo("api")
	anyPort := Binding{Protocol: "tcp", HostIP: "127.0.0.1", ContainerPort: 6443}
	w.tell(g, changed("c", tcpOn(p)), changed("kubernetes", anyPort), Event{Kind: Synced})
	number := w.chosen()
	speaks(t, number, "api")
	for _, s := range []sandbox.State{sandbox.Running, sandbox.Hibernated} {
		w.close()
		closed(t, number)
		w.open()
		w.table.State("sb", s)
		speaks(t, number, "api")
		speaks(t, p, "web")
	}
	// It is removed and comes back: the number is still its own.
	w.table.State("sb", sandbox.Running)
	w.tell(g, removed("kubernetes"))
	closed(t, number)
	w.tell(g, changed("kubernetes", anyPort))
	speaks(t, number, "api")

	// Somebody else has it.
	w.close()
	other, err := net.Listen("tcp", at(number))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w.open()
	w.table.State("sb", sandbox.Running)
	next := w.chosen()
	if next == number {
		t.Fatalf("port %d was chosen again though it is taken", next)
	}
	speaks(t, next, "api")
	w.table.State("sb", sandbox.Gone)
}

// chosen returns the number that a binding without one got.
func (w *world) chosen() (port uint16) {
	w.t.Helper()
	eventually(w.t, func() error {
		for _, l := range w.table.List("") {
			if l.HostPort == 0 && l.Port != 0 && len(l.Addresses) == 1 {
				port = l.Port
				return nil
			}
		}
		return fmt.Errorf("no number was chosen: %+v", w.table.List(""))
	})
	return port
}

// TestFileThatCantBeRead is as good as none.
func TestFileThatCantBeRead(t *testing.T) {
	for _, content := range []string{"", "{", `{"version":99}`, `{"version":1,"owners":[{"id":""},{"id":"a\u0000","bindings":null}]}`} {
		w := newWorld(t)
		if err := os.WriteFile(w.p.File("sb"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		w.open()
		g := w.run("sb")
		p := free(t)
		g.tcp[p] = w.echo("web")
		w.tell(g, changed("c", tcpOn(p)))
		speaks(t, p, "web")
	}
}

// TestGuestThatCant is not asked again until its state changes.
func TestGuestThatCant(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := &guest{runs: true, deny: fault.New(fault.Denied, "old agent")}
	w.guests["sb"] = g
	for i := range 3 {
		w.table.State("sb", sandbox.Running)
		eventually(t, func() error {
			w.mu.Lock()
			defer w.mu.Unlock()
			return levelIs(g.watch, i+1)
		})
	}
}

func TestReserve(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	two := freeMany(t, 2)
	p, q := two[0], two[1]
	g.tcp[p] = w.echo("web")
	asked := Binding{Protocol: "tcp", HostPort: p, ContainerPort: 80}
	if _, err := w.table.Reserve(t.Context(), "sb", "c", "web", []Binding{asked}); err != nil {
		t.Fatal(err)
	}
	speaks(t, p, "web")
	w.close()
	if b, _ := os.ReadFile(w.p.File("sb")); strings.Contains(string(b), "web") {
		t.Fatal("a reservation was written down")
	}
	w.open()
	w.table.State("sb", sandbox.Running)
	release, err := w.table.Reserve(t.Context(), "sb", "c", "web", []Binding{asked})
	if err != nil {
		t.Fatal(err)
	}
	// Told by the guest, as docker's twins, it stays.
	v4, v6 := asked, asked
	v4.HostIP, v6.HostIP = "0.0.0.0", "::"
	w.tell(g, removed("c"), Event{Kind: Synced}, changed("c", v4, v6))
	eventually(t, func() error { return levelIs(len(w.table.List("")), 2) })
	release()
	w.tell(g, Event{Kind: Changed})
	speaks(t, p, "web")

	// A start that failed.
	release, err = w.table.Reserve(t.Context(), "sb", "d", "web", []Binding{tcpOn(q)})
	if err != nil {
		t.Fatal(err)
	}
	release()
	closed(t, q)
}

// TestReserveRefuses all of it, in the system's words.
func TestReserveRefuses(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.run("sb")
	two := freeMany(t, 2)
	p, q := two[0], two[1]
	other, err := net.Listen("tcp", at(p))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	_, err = w.table.Reserve(t.Context(), "sb", "c", "web", []Binding{
		tcpOn(q), {Protocol: "tcp", HostPort: p, ContainerPort: 80},
	})
	var taken *TakenError
	if !errors.As(err, &taken) || !fault.Is(err, fault.Exists) || err.Error() != fmt.Sprintf("listen tcp4 0.0.0.0:%d: bind: address already in use", p) {
		t.Errorf("reserve: %v", err)
	}
	closed(t, q)
	if l := w.table.List(""); l != nil {
		t.Errorf("left: %v", l)
	}
}

// TestReserveInTheSameSandbox is for the sandbox's own docker to judge.
func TestReserveInTheSameSandbox(t *testing.T) {
	w := newWorld(t)
	w.open()
	g, other := w.run("sb"), w.run("other")
	p := free(t)
	g.tcp[p], other.tcp[p] = w.echo("web"), w.echo("other")
	w.tell(g, changed("a", tcpOn(p)))
	speaks(t, p, "web")
	release, err := w.table.Reserve(t.Context(), "sb", "b", "b", []Binding{{Protocol: "tcp", HostPort: p, ContainerPort: 80}})
	if err != nil {
		t.Fatal(err)
	}
	release()
	speaks(t, p, "web")
	_, err = w.table.Reserve(t.Context(), "other", "b", "b", []Binding{{Protocol: "tcp", HostPort: p, ContainerPort: 80}})
	want := fmt.Sprintf("listen tcp4 0.0.0.0:%d: bind: address already in use (the a of sandbox sb)", p)
	if err == nil || err.Error() != want {
		t.Errorf("reserve for another sandbox: %v, want %s", err, want)
	}
}

// TestReservationOfAContainerThatEndedGivesWay to one that runs.
func TestReservationOfAContainerThatEndedGivesWay(t *testing.T) {
	w := newWorld(t)
	w.open()
	g := w.run("sb")
	p := free(t)
	g.tcp[p] = w.echo("web")
	for _, owner := range []string{"a", "b"} {
		if _, err := w.table.Reserve(t.Context(), "sb", owner, owner, []Binding{tcpOn(p)}); err != nil {
			t.Fatal(err)
		}
	}
	w.tell(g, changed("c", tcpOn(p)), Event{Kind: Synced})
	eventually(t, func() error {
		if l := w.table.List(""); len(l) != 1 || l[0].Owner != "c" || l[0].Problem != "" {
			return fmt.Errorf("listed %+v", l)
		}
		return nil
	})
	speaks(t, p, "web")
}

func TestNothingIsOpenedWithoutLeave(t *testing.T) {
	w := newWorld(t)
	w.p.Policy.Bind = None
	w.open()
	w.table.State("sb", sandbox.Running)
	release, err := w.table.Reserve(context.Background(), "sb", "c", "c", []Binding{tcpOn(80)})
	if err != nil {
		t.Fatal(err)
	}
	release()
	if len(w.table.held) != 0 || len(w.table.boxes) != 0 {
		t.Error("something is open")
	}
}
