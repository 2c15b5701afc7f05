package ports

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/testenv"
)

// dockerd is a docker daemon of a test. Its containers outlive its serving, as
// with live-restore.
type dockerd struct {
	t      *testing.T
	socket string

	mu         sync.Mutex
	containers map[string]dockerContainer
	streams    map[chan []byte]chan struct{} // of /events: what to write, and closed to break off
	inspected  map[string]int
	server     *http.Server
	subscribed chan struct{} // one for each subscription
	listed     chan struct{} // when not nil, a list waits for it
	order      []string
}

func newDockerd(t *testing.T) *dockerd {
	return &dockerd{
		t: t, socket: filepath.Join(t.TempDir(), "docker.sock"), containers: map[string]dockerContainer{},
		streams: map[chan []byte]chan struct{}{}, inspected: map[string]int{}, subscribed: make(chan struct{}, 100),
	}
}

// start serves, on a socket that is made anew as dockerd does.
func (d *dockerd) start() {
	d.t.Helper()
	_ = os.Remove(d.socket)
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		d.t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // a killed one leaves it
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", d.events)
	mux.HandleFunc("GET /containers/json", d.list)
	mux.HandleFunc("GET /containers/{id}/json", d.inspect)
	d.server = &http.Server{Handler: mux}
	go func() { _ = d.server.Serve(l) }()
}

// kill ends serving without a word.
func (d *dockerd) kill() {
	d.mu.Lock()
	for s, over := range d.streams {
		close(over)
		delete(d.streams, s)
	}
	d.mu.Unlock()
	_ = d.server.Close()
}

func (d *dockerd) events(w http.ResponseWriter, r *http.Request) {
	var filters map[string][]string
	if err := json.Unmarshal([]byte(r.URL.Query().Get("filters")), &filters); err != nil || len(filters["type"]) != 2 {
		d.t.Errorf("filters %q: %v", r.URL.Query().Get("filters"), err)
	}
	write, over := make(chan []byte, 100), make(chan struct{})
	d.mu.Lock()
	d.streams[write] = over
	d.order = append(d.order, "events")
	d.mu.Unlock()
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	d.subscribed <- struct{}{}
	for {
		select {
		case b := <-write:
			_, _ = w.Write(b)
			w.(http.Flusher).Flush() // one chunk
		case <-over:
			panic(http.ErrAbortHandler)
		case <-r.Context().Done():
			return
		}
	}
}

func (d *dockerd) list(w http.ResponseWriter, _ *http.Request) {
	d.mu.Lock()
	d.order = append(d.order, "list")
	wait := d.listed
	ids := []dockerListed{}
	for id, c := range d.containers {
		if c.State.Running {
			ids = append(ids, dockerListed{id})
		}
	}
	d.mu.Unlock()
	if wait != nil {
		<-wait
	}
	_ = json.NewEncoder(w).Encode(ids)
}

func (d *dockerd) inspect(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, ok := d.containers[r.PathValue("id")]
	d.inspected[r.PathValue("id")]++
	if !ok {
		http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
		return
	}
	_ = json.NewEncoder(w).Encode(c)
}

// set makes a container run and publish tcp ports, IPv4 and IPv6.
func (d *dockerd) set(id string, ports ...int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var c dockerContainer
	c.ID, c.Name = id, "/"+id+"-name"
	c.State.Running, c.State.Pid = true, 7
	c.NetworkSettings.Ports = dockerPorts{"9/sctp": nil, "99/tcp": nil}
	for _, p := range ports {
		c.NetworkSettings.Ports["80/tcp"] = append(c.NetworkSettings.Ports["80/tcp"],
			struct{ HostIp, HostPort string }{"0.0.0.0", fmt.Sprint(p)}, struct{ HostIp, HostPort string }{"::", fmt.Sprint(p)})
	}
	d.containers[id] = c
}

func (d *dockerd) stop(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.containers[id]
	c.State.Running, c.State.Pid = false, 0 // its ports are there for a moment more
	d.containers[id] = c
}

func (d *dockerd) remove(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.containers, id)
}

func event(kind, action, id string) []byte {
	actor := fmt.Sprintf(`{"ID":%q,"Attributes":{"image":"x","name":"y"}}`, id)
	if kind == "network" {
		actor = fmt.Sprintf(`{"ID":"a network","Attributes":{"container":%q}}`, id)
	}
	return fmt.Appendf(nil, `{"status":%[2]q,"Type":%[1]q,"Action":%[2]q,"Actor":%[3]s,"time":1}`+"\n", kind, action, actor)
}

// tell writes an event in pieces, each a chunk of its own.
func (d *dockerd) tell(kind, action, id string, pieces int) {
	b := event(kind, action, id)
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.streams {
		for i := range pieces {
			s <- b[i*len(b)/pieces : (i+1)*len(b)/pieces]
		}
	}
}

// follow starts the source, and returns a watch that waits for its first list.
func (d *dockerd) follow() *Watch {
	b := New(quiet())
	b.Start("docker", NewDocker(d.socket, quiet()))
	w := b.Watch()
	d.t.Cleanup(func() {
		w.Close()
		b.Close()
	})
	return w
}

func (d *dockerd) awaitSubscription() {
	d.t.Helper()
	select {
	case <-d.subscribed:
	case <-time.After(patience):
		d.t.Fatal("nobody subscribed to events")
	}
}

func startDockerd(t *testing.T) *dockerd {
	testenv.CheckGoroutines(t)
	d := newDockerd(t)
	d.start()
	t.Cleanup(func() { d.kill() })
	return d
}

func TestDockerFollowsContainers(t *testing.T) {
	d := startDockerd(t)
	d.set("a", 8080)
	d.set("silent")
	w := d.follow()
	expect(t, w, "+a:8080:8080", "=")
	for _, step := range []struct {
		do           func()
		kind, action string
		id           string
		want         string
	}{
		{func() { d.set("b", 1, 2) }, "container", "start", "b", "+b:1:1:2:2"},
		{func() { d.set("b", 3) }, "container", "restart", "b", "+b:3:3"},
		{func() { d.set("b") }, "network", "disconnect", "b", "-b"},
		{func() { d.set("b", 3) }, "network", "connect", "b", "+b:3:3"},
		{func() { d.stop("b") }, "container", "die", "b", "-b"},
		{func() { d.set("b", 5) }, "container", "unpause", "b", "+b:5:5"},
		{func() { d.remove("b") }, "container", "destroy", "b", "-b"},
	} {
		step.do()
		d.tell(step.kind, step.action, step.id, 1)
		expect(t, w, step.want)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.order[0] != "events" {
		t.Errorf("asked for %q first: events between the list and the subscription would be lost", d.order[0])
	}
}

// TestDockerEventsInPieces: a chunk of HTTP ends anywhere.
func TestDockerEventsInPieces(t *testing.T) {
	d := startDockerd(t)
	w := d.follow()
	expect(t, w, "=")
	for pieces := 2; pieces < 20; pieces++ {
		id := fmt.Sprint("c", pieces)
		d.set(id, pieces)
		d.tell("container", "start", id, pieces)
		expect(t, w, fmt.Sprintf("+%s:%d:%d", id, pieces, pieces))
	}
}

// TestDockerMissesNothingBeforeItsList: what happens while the list is made is
// looked at after it.
func TestDockerMissesNothingBeforeItsList(t *testing.T) {
	d := startDockerd(t)
	d.set("a", 1)
	d.set("b", 2)
	d.listed = make(chan struct{})
	w := d.follow()
	d.awaitSubscription()
	d.set("c", 3)
	d.tell("container", "start", "c", 1)
	d.remove("a")
	d.tell("container", "destroy", "a", 1)
	close(d.listed)
	got := map[string]bool{}
	for !got["+c:3:3"] || !got["="] {
		got[next(t, w)] = true
	}
	if got["+a:1:1"] || !got["+b:2:2"] {
		t.Errorf("told %v", got)
	}
}

// TestDockerComesBack: while the daemon is away its containers keep their
// ports, and what changed meanwhile is told when it is back.
func TestDockerComesBack(t *testing.T) {
	d := startDockerd(t)
	d.set("stays", 1)
	d.set("goes", 2)
	w := d.follow()
	first := []string{next(t, w), next(t, w), next(t, w)} // in the order of the daemon's list, which is any
	if !slices.Contains(first, "+stays:1:1") || !slices.Contains(first, "+goes:2:2") || first[2] != "=" {
		t.Fatalf("told %v", first)
	}
	for i := range 3 {
		d.kill()
		d.remove("goes")
		d.set("new", 10+i)
		silent(t, w)
		again := w.board.Watch()
		if i == 0 {
			expect(t, again, first...)
		}
		again.Close()
		d.start()
		if i == 0 {
			expect(t, w, "-goes")
		}
		expect(t, w, fmt.Sprintf("+new:%d:%d", 10+i, 10+i))
	}
}

// TestDockerBreaksOffWithinAnEvent and goes on.
func TestDockerBreaksOffWithinAnEvent(t *testing.T) {
	d := startDockerd(t)
	w := d.follow()
	expect(t, w, "=")
	b := event("container", "start", "a")
	d.set("a", 1)
	d.mu.Lock()
	for s, over := range d.streams {
		s <- b[:len(b)/2]
		close(over)
		delete(d.streams, s)
	}
	d.mu.Unlock()
	expect(t, w, "+a:1:1")
}

// TestDockerLaterThanItsSource: the socket is waited for, and nothing polls.
func TestDockerLaterThanItsSource(t *testing.T) {
	testenv.CheckGoroutines(t)
	d := newDockerd(t)
	w := d.follow()
	expect(t, w, "=") // nobody there
	d.set("a", 1)
	d.start()
	defer d.kill()
	expect(t, w, "+a:1:1")
}

func TestDockerContainerBetweenTwoLives(t *testing.T) {
	var c dockerContainer
	b := []byte(`{"Id":"x","Name":"/web","State":{"Running":true,"Restarting":true,"Pid":0},
		"NetworkSettings":{"Ports":{"80/tcp":[{"HostIp":"","HostPort":"80"}]}}}`)
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	if o := c.owner("x"); len(o.Bindings) != 0 || o.Name != "web" {
		t.Errorf("publishes %v", o)
	}
}

// TestDockerWithoutItsProxy publishes nothing over IPv6.
func TestDockerWithoutItsProxy(t *testing.T) {
	var c dockerContainer
	b := []byte(`{"Id":"x","State":{"Running":true,"Pid":7},
		"HostConfig":{"PortBindings":{
			"80/tcp":[{"HostIp":"","HostPort":"8080"},{"HostIp":"127.0.0.1","HostPort":"8081"},{"HostIp":"::1","HostPort":"8082"}],
			"53/udp":[{"HostIp":"127.0.0.1","HostPort":"53"}],
			"90/tcp":[{"HostIp":"","HostPort":""}]}},
		"NetworkSettings":{"Networks":{"bridge":{"IPAddress":"172.17.0.2"}},"Ports":{
			"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8080"},{"HostIp":"127.0.0.1","HostPort":"8081"}],
			"53/udp":[{"HostIp":"127.0.0.1","HostPort":"53"}],
			"90/tcp":[{"HostIp":"0.0.0.0","HostPort":"49153"}]}}}`)
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	o := c.owner("x")
	var got []string
	for _, b := range o.Bindings {
		got = append(got, fmt.Sprintf("%s %s %d %d %v", b.Protocol, b.HostIP, b.HostPort, b.ContainerPort, b.Way))
	}
	want := []string{
		"tcp 0.0.0.0 8080 80 invalid AddrPort", "tcp :: 8080 80 invalid AddrPort", "tcp 127.0.0.1 8081 80 invalid AddrPort",
		"tcp ::1 8082 80 172.17.0.2:80", "tcp 0.0.0.0 49153 90 invalid AddrPort", "udp 127.0.0.1 53 53 127.0.0.1:53",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("publishes (-want +got):\n%s", d)
	}
	board, h := New(quiet()), newHand()
	defer board.Close()
	board.Start("h", h)
	(<-h.sink).Set(o)
	for _, w := range []struct {
		protocol string
		port     uint16
		way      string
	}{{"tcp", 8080, ""}, {"tcp", 8082, "172.17.0.2:80"}, {"udp", 53, "127.0.0.1:53"}, {"udp", 8082, ""}, {"tcp", 1, ""}} {
		way, ok := board.Way(w.protocol, w.port)
		if ok != (w.way != "") || ok && way.String() != w.way {
			t.Errorf("way to %s port %d: %v, want %q", w.protocol, w.port, way, w.way)
		}
	}
}
