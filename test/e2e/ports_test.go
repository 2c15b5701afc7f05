package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// publisher is a sandbox whose containers publish ports, which the test looks
// for on the host's loopback. What the containers run answers with what it is
// sent, over TCP and UDP.
type publisher struct {
	dockerGuest
	number int // a port of the host that was free
}

// soon is how long a change may take to get to the host, on a busy machine and
// with an emulated guest.
const soon = 2 * time.Minute

// TestPublishedPorts publishes ports from containers that a client inside the
// sandbox starts, and has everything happen to them.
func TestPublishedPorts(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a Docker; -short")
	}
	d := harness.Start(t, harness.Options{TCP: true})
	buildTemplate(t, d, "docker")
	p := publisher{dockerGuest: dockerGuest{t: t, d: d}.in(d.Create("--network", "none", "--vcpus", "2", "-m", "1024", "docker")), number: freeNumber(t)}
	if list := p.list(); len(list) != 0 {
		t.Errorf("published before there is a Docker: %v", list)
	}
	p.await((*arcboxv1.RuntimeEnsureResponse).GetReady)
	putInside(t, d, p.id, buildInside(t))
	p.sh(`tar -C /bin -c inside | docker import -c 'ENTRYPOINT ["/inside", "serve"]' - inside:1`)
	for _, part := range []struct {
		name string
		do   func(publisher)
	}{
		{"addresses and protocols", publisher.answersEverywhere},
		{"a range", publisher.publishesARange},
		{"a taken port", publisher.waitsForAPort},
		{"a swap", publisher.swaps},
		{"dockerd is killed", publisher.outlivesDockerd},
		{"hutchd is killed", publisher.outlivesHutchd},
		{"the sandbox sleeps", publisher.sleeps},
	} {
		if !t.Run(part.name, func(t *testing.T) {
			p := p
			p.dockerGuest = p.on(t)
			part.do(p)
		}) {
			return // all that follows needs it
		}
	}
	d.Hutch("rm", p.id)
	if err := echoes("tcp", p.at("127.0.0.1", 0), "?"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("port of a sandbox that is gone: %v", err)
	}
}

// freeNumber returns a port of the loopback that nobody has, and whose next
// ones are most likely free.
func freeNumber(t *testing.T) int {
	t.Helper()
	_, port, err := net.SplitHostPort(harness.FreePort(t))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return min(n, 60000)
}

func (p publisher) at(host string, offset int) string {
	return net.JoinHostPort(host, strconv.Itoa(p.number+offset))
}

// docker runs a command line of docker, with the port numbers of the test in
// the place of P0, P1, ...
func (p publisher) docker(args string) {
	p.t.Helper()
	for i := 9; i >= 0; i-- {
		args = strings.ReplaceAll(args, fmt.Sprintf("P%d", i), strconv.Itoa(p.number+i))
	}
	p.sh("docker " + args + " >/dev/null")
}

// list returns what hutchd says is published.
func (p publisher) list() []*hostagentv1.PublishedPort {
	p.t.Helper()
	c := hostagentv1connect.NewPortServiceClient(http.DefaultClient, "http://"+p.d.TCP)
	res, err := c.ListPorts(testenv.Context(p.t), connect.NewRequest(&hostagentv1.ListPortsRequest{SandboxId: p.id}))
	if err != nil {
		p.t.Fatal(err)
	}
	return res.Msg.GetPorts()
}

// agrees waits until hutchd lists what docker itself says is published, no more
// and no less, but for IPv6, which docker leaves out.
func (p publisher) agrees() {
	p.t.Helper()
	var want []string
	for _, id := range strings.Fields(p.sh("docker ps -q --no-trunc")) {
		var ports map[string][]struct{ HostIP, HostPort string }
		if err := json.Unmarshal([]byte(p.sh("docker inspect -f '{{json .NetworkSettings.Ports}}' "+id)), &ports); err != nil {
			p.t.Fatal(err)
		}
		for inner, hosts := range ports {
			for _, h := range hosts {
				want = append(want, fmt.Sprint(id, " ", inner, " ", h.HostIP, " ", h.HostPort))
			}
		}
	}
	slices.Sort(want)
	harness.Eventually(p.t, soon, func() error {
		var got []string
		for _, l := range p.list() {
			if !strings.Contains(l.GetHostIp(), ":") {
				got = append(got, fmt.Sprintf("%s %d/%s %s %d", l.GetOwner(), l.GetContainerPort(), l.GetProtocol(), l.GetHostIp(), l.GetHostPort()))
			}
		}
		slices.Sort(got)
		if !slices.Equal(want, got) {
			return fmt.Errorf("docker publishes %q, hutchd %q", want, got)
		}
		return nil
	})
}

// echoes sends text and wants it back.
func echoes(network, address, text string) error {
	c, err := net.DialTimeout(network, address, 20*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text)+1)
	n := 0
	if network == "udp" {
		n, err = c.Read(got)
	} else {
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
		n, err = io.ReadFull(c, got)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = nil
		}
	}
	if err == nil && !bytes.Equal(got[:n], []byte(text)) {
		err = fmt.Errorf("%s %s: %d bytes came back of %d", network, address, n, len(text))
	}
	return err
}

func (p publisher) answers(network, address string, size int) {
	p.t.Helper()
	text := string(random(size))
	harness.Eventually(p.t, soon, func() error { return echoes(network, address, text) })
}

// answersEverywhere publishes on all kinds of addresses.
func (p publisher) answersEverywhere() {
	p.docker("run -d --name one -p P0:9001 -p P0:9001/udp -p 127.0.0.1:P1:9001 -p 127.0.0.1:P1:9001/udp -p '[::1]:P2:9001' inside:1")
	p.agrees()
	for address, network := range map[string]string{
		p.at("127.0.0.1", 0): "tcp", p.at("::1", 0): "tcp", p.at("127.0.0.1", 1): "tcp", p.at("::1", 2): "tcp",
	} {
		p.answers(network, address, 1<<20)
	}
	for _, size := range []int{1, 1400, 9000, 65507} {
		p.answers("udp", p.at("127.0.0.1", 0), size)
	}
	p.answers("udp", p.at("127.0.0.1", 1), 1400)
	for _, other := range otherAddresses(p.t) {
		for offset := range 2 {
			if err := echoes("tcp", p.at(other, offset), "?"); !errors.Is(err, syscall.ECONNREFUSED) {
				p.t.Errorf("at the host's address %s: %v, want a refusal", other, err)
			}
		}
	}
	for address, offset := range map[string]int{"::1": 1, "127.0.0.1": 2} {
		if err := echoes("tcp", p.at(address, offset), "?"); !errors.Is(err, syscall.ECONNREFUSED) {
			p.t.Errorf("at %s, which was not asked for: %v", p.at(address, offset), err)
		}
	}
	if out := p.d.Hutch("port", "ls", p.id); !strings.Contains(out, p.at("127.0.0.1", 0)) || !strings.Contains(out, "loopback only") {
		p.t.Errorf("listed as\n%s", out)
	}
}

// otherAddresses returns addresses of this host that are not loopback's.
func otherAddresses(t *testing.T) (out []string) {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			out = append(out, n.IP.String())
		}
	}
	return out[:min(len(out), 2)]
}

// publishesARange of ports: each costs an emulated docker seconds, so that it is
// a hundred only where there is time for it.
func (p publisher) publishesARange() {
	size := 20
	if testenv.Soak() {
		size = 100
	}
	p.number += 100
	p.sh(fmt.Sprintf("docker run -d --name range -p %d-%d:9001-%d inside:1 >/dev/null", p.number, p.number+size-1, 9000+size))
	p.agrees()
	p.answers("tcp", p.at("127.0.0.1", 0), 1000)
	open := 0
	for _, l := range p.list() {
		if n := int(l.GetHostPort()); n >= p.number && n < p.number+size && l.GetHostIp() == "0.0.0.0" && slices.Contains(l.GetHostAddresses(), "127.0.0.1") {
			open++
		}
	}
	if open != size {
		p.t.Errorf("%d of %d ports are open", open, size)
	}
	p.docker("rm -f range")
	p.agrees()
}

// waitsForAPort that a program of the host has.
func (p publisher) waitsForAPort() {
	other, err := net.Listen("tcp", p.at("127.0.0.1", 3))
	if err != nil {
		p.t.Fatal(err)
	}
	defer other.Close()
	p.docker("run -d --name late -p 127.0.0.1:P3:9001 inside:1")
	harness.Eventually(p.t, soon, func() error {
		for _, l := range p.list() {
			if l.GetName() == "late" && strings.Contains(l.GetProblem(), "address already in use") {
				return nil
			}
		}
		return fmt.Errorf("nothing is said of a port that is taken: %v", p.list())
	})
	other.Close()
	p.answers("tcp", p.at("127.0.0.1", 3), 1000)
	p.docker("rm -f late")
	p.agrees()
}

// swaps a port from one container to another.
func (p publisher) swaps() {
	p.docker("stop -t 0 one")
	p.agrees()
	p.docker("run -d --name two --restart always -p P0:9001 inside:1")
	p.docker("rm one")
	p.agrees()
	p.answers("tcp", p.at("127.0.0.1", 0), 1000)
	if l := p.list(); len(l) == 0 || l[0].GetName() != "two" {
		p.t.Errorf("listed: %v", l)
	}
	p.docker("rename two three")
	harness.Eventually(p.t, soon, func() error {
		if l := p.list(); len(l) == 0 || l[0].GetName() != "three" {
			return fmt.Errorf("listed: %v", l)
		}
		return nil
	})
}

// outlivesDockerd: a container goes on without its daemon, and with it its
// ports; the daemon that comes back is followed.
func (p publisher) outlivesDockerd() {
	p.sh("p=$(pidof dockerd); kill -9 $p; while [ -e /proc/$p ]; do :; done")
	p.answers("tcp", p.at("127.0.0.1", 0), 1000)
	p.await((*arcboxv1.RuntimeEnsureResponse).GetReady)
	p.agrees()
	p.docker("run -d --name four -p 127.0.0.1:P4:9001 inside:1")
	p.answers("tcp", p.at("127.0.0.1", 4), 1000)
	p.docker("rm -f four")
	p.agrees()
}

// outlivesHutchd: the next one has everything open when it is ready.
func (p publisher) outlivesHutchd() {
	p.d.Down(syscall.SIGKILL)
	if err := echoes("tcp", p.at("127.0.0.1", 0), "?"); !errors.Is(err, syscall.ECONNREFUSED) {
		p.t.Errorf("without hutchd: %v", err)
	}
	p.d.Up()
	if l := p.list(); len(l) == 0 || len(l[0].GetHostAddresses()) == 0 {
		p.t.Errorf("after a restart: %v", l)
	}
	p.answers("tcp", p.at("127.0.0.1", 0), 1000)
	p.agrees()
}

// sleeps: the ports of a sandbox that is paused stay open, and lead nowhere
// until it is resumed.
func (p publisher) sleeps() {
	p.d.Hutch("pause", p.id)
	ctx, cancel := context.WithTimeout(testenv.Context(p.t), time.Minute)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", p.at("127.0.0.1", 0))
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		p.t.Errorf("a port of a paused sandbox: %v, want a reset", err)
	}
	p.d.Hutch("resume", p.id)
	p.answers("tcp", p.at("127.0.0.1", 0), 1000)
}
