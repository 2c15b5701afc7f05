package ports

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// dockerListed is what counts of an entry of /containers/json.
type dockerListed struct {
	ID string `json:"Id"`
}

// dockerContainer is what counts of an inspected container.
type dockerContainer struct {
	ID    string `json:"Id"`
	Name  string
	State struct {
		Running    bool
		Restarting bool
		Pid        int
	}
	HostConfig struct {
		PortBindings dockerPorts // what was asked for
	}
	NetworkSettings struct {
		Ports    dockerPorts
		Networks map[string]struct{ IPAddress string }
	}
}

// dockerPorts is by "80/tcp"; null where nothing is published. The names are
// docker's.
type dockerPorts map[string][]struct{ HostIp, HostPort string }

// owner is what c publishes. A container that is about to be started again
// counts as running with docker, but has no process.
func (c dockerContainer) owner(id string) Owner {
	o := Owner{ID: cmp.Or(c.ID, id), Name: strings.TrimPrefix(c.Name, "/")}
	if !c.State.Running || c.State.Restarting || c.State.Pid == 0 {
		return o
	}
	o.Bindings = append(c.NetworkSettings.Ports.bindings(), c.overIPv6()...)
	for i, b := range o.Bindings {
		// The kernel passes on what is sent to the loopback address alone.
		if a, err := netip.ParseAddr(b.HostIP); err == nil && a.Is4() && a.IsLoopback() && b.Protocol == "udp" {
			o.Bindings[i].Way = netip.AddrPortFrom(a, b.HostPort)
		}
	}
	sortBindings(o.Bindings)
	return o
}

// bindings returns what p says, for the protocols that can be carried.
func (p dockerPorts) bindings() (out []Binding) {
	for name, hosts := range p {
		number, protocol, _ := strings.Cut(name, "/")
		port, err := parsePort(number)
		if err != nil || (protocol != "tcp" && protocol != "udp") {
			continue // sctp
		}
		for _, h := range hosts {
			if at, err := parsePort(h.HostPort); err == nil {
				out = append(out, Binding{ContainerPort: port, HostPort: at, Protocol: protocol, HostIP: h.HostIp})
			}
		}
	}
	return out
}

// overIPv6 returns what was asked for over IPv6 and docker did not publish: a
// daemon without its proxy, in a machine without IPv6, does not, while the host
// may well have it. What asks for every address shares its number with IPv4; of
// what asks for IPv6 alone the way is the container itself.
func (c dockerContainer) overIPv6() (out []Binding) {
	published := c.NetworkSettings.Ports.bindings()
	for _, b := range c.HostConfig.PortBindings.bindings() {
		a, err := netip.ParseAddr(b.HostIP)
		every := b.HostIP == ""
		if !every && (err != nil || !a.Is6() || a.Is4In6()) {
			continue
		}
		same := func(p Binding, six bool) bool {
			at, err := netip.ParseAddr(p.HostIP)
			return p.Protocol == b.Protocol && p.HostPort == b.HostPort && err == nil && at.Is6() == six
		}
		if slices.ContainsFunc(published, func(p Binding) bool { return same(p, true) }) {
			continue
		}
		if every {
			if b.HostIP = "::"; slices.ContainsFunc(published, func(p Binding) bool { return same(p, false) }) {
				out = append(out, b)
			}
			continue
		}
		if b.Way = c.at(b.ContainerPort); b.Way.IsValid() {
			out = append(out, b)
		}
	}
	return out
}

// at is a port of the container as its machine reaches it.
func (c dockerContainer) at(port uint16) netip.AddrPort {
	for _, name := range slices.Sorted(maps.Keys(c.NetworkSettings.Networks)) {
		if a, err := netip.ParseAddr(c.NetworkSettings.Networks[name].IPAddress); err == nil {
			return netip.AddrPortFrom(a, port)
		}
	}
	return netip.AddrPort{}
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && n == 0 {
		err = strconv.ErrRange
	}
	return uint16(n), err
}

func sortBindings(b []Binding) {
	slices.SortFunc(b, func(a, b Binding) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.HostPort, b.HostPort),
			cmp.Compare(a.HostIP, b.HostIP), cmp.Compare(a.ContainerPort, b.ContainerPort))
	})
}

// dockerEvent is what counts of an event.
type dockerEvent struct {
	Type  string
	Actor struct {
		ID         string
		Attributes struct {
			Container string `json:"container"` // of a network's
		}
	}
}

// container is whom an event is about.
func (e dockerEvent) container() string {
	if e.Type == "network" {
		return e.Actor.Attributes.Container
	}
	return e.Actor.ID
}

// subscribe opens the stream of those events that may change what is
// published. The daemon has subscribed when it returns.
func (d *Docker) subscribe(ctx context.Context) (io.ReadCloser, error) {
	filters := map[string][]string{
		"type":  {"container", "network"},
		"event": {"start", "restart", "unpause", "pause", "die", "destroy", "rename", "connect", "disconnect"},
	}
	b, err := json.Marshal(filters)
	if err != nil {
		return nil, err
	}
	res, err := d.send(ctx, "/events?filters="+url.QueryEscape(string(b)))
	if err != nil {
		return nil, err
	}
	return res.Body, nil
}

// readEvents notes the containers of events until the stream ends.
func readEvents(r io.Reader, seen *pending) error {
	decoder := json.NewDecoder(bufio.NewReader(r))
	for {
		var e dockerEvent
		if err := decoder.Decode(&e); err != nil {
			return err
		}
		if id := e.container(); id != "" {
			seen.add(id)
		}
	}
}

// pending is the containers that are to be looked at, in order. One that
// changes ten times meanwhile is looked at once.
type pending struct {
	kick chan struct{}

	mu  sync.Mutex
	ids []string        // guarded by mu
	has map[string]bool // guarded by mu
	all bool            // guarded by mu; there were too many
}

func newPending() *pending { return &pending{kick: make(chan struct{}, 1), has: map[string]bool{}} }

func (p *pending) add(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.has[id] || p.all:
	case len(p.ids) >= maxPending:
		p.all, p.ids, p.has = true, nil, map[string]bool{}
	default:
		p.has[id] = true
		p.ids = append(p.ids, id)
	}
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// take empties p; all says to list everything instead.
func (p *pending) take() (ids []string, all bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids, all = p.ids, p.all
	p.ids, p.has, p.all = nil, map[string]bool{}, false
	return ids, all
}
