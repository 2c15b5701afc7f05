package ports

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// patience bounds what a test waits for.
const patience = 20 * time.Second

// world is the sandboxes of a test and the table over them.
type world struct {
	t     *testing.T
	dir   string
	table *Table
	p     Params

	mu     sync.Mutex
	guests map[sandbox.ID]*guest
}

// guest is the guest of one sandbox. Its servers are on the test's own loopback.
type guest struct {
	events chan Event
	broken chan struct{} // closed to break the stream off
	runs   bool
	tcp    map[uint16]string
	udp    map[uint16]string
	uses   int
	watch  int // streams so far
	deny   error
}

func newWorld(t *testing.T) *world {
	testenv.CheckGoroutines(t)
	w := &world{t: t, dir: t.TempDir(), guests: map[sandbox.ID]*guest{}}
	w.p = Params{
		Sandboxes: w, Policy: Policy{Bind: Loopback}, Log: slog.New(slog.DiscardHandler),
		File:       func(id sandbox.ID) string { return filepath.Join(w.dir, string(id)+".json") },
		retryEvery: 50 * time.Millisecond, settle: time.Millisecond,
	}
	t.Cleanup(func() {
		if w.table != nil {
			w.close()
		}
	})
	return w
}

// open makes the table, as a new hutchd does.
func (w *world) open() {
	w.t.Helper()
	table, err := New(w.p)
	if err != nil {
		w.t.Fatal(err)
	}
	w.table = table
}

func (w *world) close() {
	w.t.Helper()
	if err := w.table.Close(); err != nil {
		w.t.Error(err)
	}
}

// run adds a running sandbox.
func (w *world) run(id sandbox.ID) *guest {
	g := &guest{events: make(chan Event), broken: make(chan struct{}), runs: true, tcp: map[uint16]string{}, udp: map[uint16]string{}}
	w.mu.Lock()
	w.guests[id] = g
	w.mu.Unlock()
	w.table.State(id, sandbox.Running)
	return g
}

// tell has the guest tell events.
func (w *world) tell(g *guest, events ...Event) {
	w.t.Helper()
	for _, e := range events {
		select {
		case g.events <- e:
		case <-time.After(patience):
			w.t.Fatal("nobody listens to the guest")
		}
	}
}

func changed(owner string, b ...Binding) Event {
	return Event{Kind: Changed, Owner: Owner{ID: owner, Name: "the " + owner, Bindings: b}}
}

func removed(owner string) Event { return Event{Kind: Removed, Owner: Owner{ID: owner}} }

func (w *world) guest(id sandbox.ID) (*guest, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	g := w.guests[id]
	switch {
	case g == nil:
		return nil, fault.New(fault.NotFound, "no sandbox %s", id)
	case !g.runs:
		return nil, fault.New(fault.Precondition, "sandbox %s does not run", id)
	}
	return g, nil
}

func (w *world) Use(_ context.Context, id sandbox.ID) (Guest, func(), error) {
	g, err := w.guest(id)
	if err != nil {
		return nil, nil, err
	}
	w.mu.Lock()
	g.uses++
	w.mu.Unlock()
	return g, func() {
		w.mu.Lock()
		g.uses--
		w.mu.Unlock()
	}, nil
}

func (w *world) Watch(ctx context.Context, id sandbox.ID, each func(Event) error) error {
	g, err := w.guest(id)
	if err != nil {
		return err
	}
	w.mu.Lock()
	g.watch++
	broken, deny := g.broken, g.deny
	w.mu.Unlock()
	if deny != nil {
		return deny
	}
	for {
		select {
		case e := <-g.events:
			if err := each(e); err != nil {
				return err
			}
		case <-broken:
			return fault.New(fault.Unavailable, "link is lost")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// breakOff ends the guest's stream; the next one stands.
func (w *world) breakOff(g *guest) {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(g.broken)
	g.broken = make(chan struct{})
}

func (g *guest) DialPort(_ context.Context, port uint16) (net.Conn, error) {
	return dialIn(g.tcp, "tcp", port)
}

func (g *guest) DialUDP(_ context.Context, port uint16) (net.Conn, error) {
	return dialIn(g.udp, "udp", port)
}

func dialIn(servers map[uint16]string, network string, port uint16) (net.Conn, error) {
	at, ok := servers[port]
	if !ok {
		return nil, fault.New(fault.Unavailable, "port %d of guest: nothing listens", port)
	}
	return net.Dial(network, at)
}

// echo serves on the loopback: it says its name, then what it is told.
func (w *world) echo(name string) string {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.WriteString(c, name+"\n")
				_, _ = io.Copy(c, c)
			})
		}
	})
	w.t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// echoUDP sends every datagram back, behind the number of the socket that it
// came from as the server sees it.
func (w *world) echoUDP() string {
	w.t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	w.t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c.LocalAddr().String()
}

// free returns a port of the loopback that nobody has.
func free(t *testing.T) uint16 {
	t.Helper()
	return freeMany(t, 1)[0]
}

// freeMany returns n ports of the loopback that nobody has.
func freeMany(t *testing.T, n int) (ports []uint16) {
	t.Helper()
	for len(ports) < n {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // so that none comes twice
		port := l.Addr().(*net.TCPAddr).Port
		u, err := net.ListenPacket("udp4", "127.0.0.1:"+strconv.Itoa(port))
		if err != nil {
			continue
		}
		u.Close()
		ports = append(ports, uint16(port))
	}
	return ports
}

func tcpOn(port uint16) Binding {
	return Binding{Protocol: "tcp", HostIP: "127.0.0.1", HostPort: port, ContainerPort: 80}
}

func at(port uint16) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))) }

// answers returns who answers at an address.
func answers(address string) (string, error) {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 100)
	n, err := c.Read(b)
	return strings.TrimSpace(string(b[:n])), err
}

// eventually waits until f is fine.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(patience); ; {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal(err)
		}
	}
}

// speaks waits until name answers at a port.
func speaks(t *testing.T, port uint16, name string) {
	t.Helper()
	eventually(t, func() error {
		got, err := answers(at(port))
		if err == nil && got != name {
			err = fmt.Errorf("%q answers at port %d, want %q", got, port, name)
		}
		return err
	})
}

// closed waits until nothing listens at a port.
func closed(t *testing.T, port uint16) {
	t.Helper()
	eventually(t, func() error {
		c, err := net.Dial("tcp", at(port))
		if err != nil {
			return nil
		}
		c.Close()
		return fmt.Errorf("port %d is open", port)
	})
}

// problem waits until the first binding's problem holds text.
func (w *world) problem(text string) {
	w.t.Helper()
	eventually(w.t, func() error {
		list := w.table.List("")
		if len(list) == 0 || !strings.Contains(list[0].Problem, text) || text == "" && list[0].Problem != "" {
			return fmt.Errorf("listed are %+v, want a problem with %q", list, text)
		}
		return nil
	})
}

// inUse returns how many uses of a guest there are.
func (w *world) inUse(g *guest) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return g.uses
}
