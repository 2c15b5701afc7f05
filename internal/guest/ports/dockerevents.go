package ports

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"io"
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
	NetworkSettings struct {
		// Ports is by "80/tcp"; null where nothing is published.
		Ports map[string][]struct{ HostIp, HostPort string } //nolint:revive // docker's names
	}
}

// owner is what c publishes. A container that is about to be started again
// counts as running with docker, but has no process.
func (c dockerContainer) owner(id string) Owner {
	o := Owner{ID: cmp.Or(c.ID, id), Name: strings.TrimPrefix(c.Name, "/")}
	if !c.State.Running || c.State.Restarting || c.State.Pid == 0 {
		return o
	}
	for name, hosts := range c.NetworkSettings.Ports {
		number, protocol, _ := strings.Cut(name, "/")
		port, err := parsePort(number)
		if err != nil || (protocol != "tcp" && protocol != "udp") {
			continue // sctp
		}
		for _, h := range hosts {
			at, err := parsePort(h.HostPort)
			if err != nil {
				continue
			}
			o.Bindings = append(o.Bindings, Binding{ContainerPort: port, HostPort: at, Protocol: protocol, HostIP: h.HostIp})
		}
	}
	sortBindings(o.Bindings)
	return o
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
