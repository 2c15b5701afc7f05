package dockersock

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
)

// maxCreate bounds a request to make a container, in bytes.
const maxCreate = 4 << 20

var createPath = regexp.MustCompile(`^(/v[0-9.]+)?/containers/create$`)

// createOf returns the version of the API in the path of r, if it makes a
// container.
func createOf(r *http.Request) (version string, ok bool) {
	m := createPath.FindStringSubmatch(r.URL.Path)
	if r.Method != http.MethodPost || m == nil {
		return "", false
	}
	return m[1], true
}

// creation is a request to make a container as far as it is looked at. The rest
// is passed on as it came.
type creation struct {
	all, host map[string]json.RawMessage
	image     string
	exposed   map[string]struct{}
	everyPort bool // publish all that is exposed
	ports     map[string][]hostPort
}

// readCreation reads a request, nil when there is nothing in it to be chosen:
// what is wrong with it the daemon says.
func readCreation(b []byte) *creation {
	var said struct {
		Image        string
		ExposedPorts map[string]struct{}
		HostConfig   struct {
			NetworkMode     string
			PublishAllPorts bool
			PortBindings    map[string][]hostPort
		}
	}
	c := &creation{}
	if json.Unmarshal(b, &said) != nil || json.Unmarshal(b, &c.all) != nil || json.Unmarshal(c.all["HostConfig"], &c.host) != nil {
		return nil
	}
	if c.host == nil || !ownNetwork(said.HostConfig.NetworkMode) {
		return nil
	}
	c.image, c.exposed, c.ports = said.Image, said.ExposedPorts, said.HostConfig.PortBindings
	c.everyPort = said.HostConfig.PublishAllPorts
	return c
}

// openPort is a port of the host that a creation leaves to be chosen.
type openPort struct {
	Wish
	key string // of ports
	at  int    // in there
}

// open returns all that is left to be chosen.
func (c *creation) open() (all []openPort) {
	for _, key := range slices.Sorted(maps.Keys(c.ports)) {
		inside, protocol, ok := parsePort(key)
		if !ok {
			continue
		}
		for i, p := range c.ports[key] {
			first, last, ok := numbers(p.HostPort)
			if ok && p.understood() {
				all = append(all, openPort{Wish{protocol, p.HostIP, first, last, inside}, key, i})
			}
		}
	}
	return all
}

// numbers reads the numbers that a port of the host may have, when it is to be
// chosen among them.
func numbers(s string) (first, last uint16, ok bool) {
	if s == "" || s == "0" {
		return 0, 0, true
	}
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		return 0, 0, false
	}
	a, err := strconv.ParseUint(from, 10, 16)
	b, err2 := strconv.ParseUint(to, 10, 16)
	return uint16(a), uint16(b), err == nil && err2 == nil && 0 < a && a <= b
}

// publishEvery adds what is exposed and has no port of the host.
func (c *creation) publishEvery(exposed ...map[string]struct{}) {
	if c.ports == nil {
		c.ports = map[string][]hostPort{}
	}
	for _, set := range exposed {
		for key := range set {
			if _, _, ok := parsePort(key); ok && len(c.ports[key]) == 0 {
				c.ports[key] = []hostPort{{}}
			}
		}
	}
}

// body is the request with the ports that were chosen.
func (c *creation) body() ([]byte, error) {
	var err error
	if c.host["PortBindings"], err = json.Marshal(c.ports); err != nil {
		return nil, err
	}
	if c.all["HostConfig"], err = json.Marshal(c.host); err != nil {
		return nil, err
	}
	return json.Marshal(c.all)
}

// choose reads a request to make a container, and has the host choose the ports
// that it leaves open: the daemon in the guest, which would, knows only what is
// free there, and the daemons of two sandboxes choose the same. The returned
// function hears whether the container was made then.
func (d *door) choose(r *http.Request, g guestconn.Guest, version string, body io.Reader) (worked func(bool), err error) {
	b, err := io.ReadAll(io.LimitReader(body, maxCreate+1))
	if err != nil {
		return nothing, fault.New(fault.Canceled, "read the container to be made: %w", err)
	}
	if len(b) > maxCreate {
		return nothing, fault.New(fault.Invalid, "a container is described by at most %d bytes", maxCreate)
	}
	worked = nothing
	if c := readCreation(b); c != nil && d.s.p.Ports != nil {
		if b, worked, err = d.chooseFor(r.Context(), g, c, b, version, containerName(r)); err != nil {
			return nothing, err
		}
	}
	r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
	return worked, nil
}

// containerName is the name that a new container is to have.
func containerName(r *http.Request) string {
	if name := r.URL.Query().Get("name"); name != "" {
		return readable(name)
	}
	return "a new container"
}

// chooseFor returns the request for c, b as it came, with its open ports chosen.
func (d *door) chooseFor(ctx context.Context, g guestconn.Guest, c *creation, b []byte, version, name string) ([]byte, func(bool), error) {
	if c.everyPort {
		var image struct {
			Config struct{ ExposedPorts map[string]struct{} }
		}
		path := (&url.URL{Path: version + "/images/" + c.image + "/json"}).EscapedPath()
		if _, err := d.get(ctx, g, path, &image); err != nil { // not found: the daemon tells the caller
			return nil, nothing, err
		}
		c.publishEvery(c.exposed, image.Config.ExposedPorts)
	}
	open := c.open()
	if len(open) == 0 {
		return b, nothing, nil
	}
	if len(open) > maxBindings {
		return nil, nothing, tooMany(name, len(open))
	}
	wishes := make([]Wish, len(open))
	for i, o := range open {
		wishes[i] = o.Wish
	}
	chosen, release, err := d.s.p.Ports.Choose(ctx, d.id, name, wishes)
	if fault.Is(err, fault.Exists) {
		return nil, nothing, fault.New(fault.Internal, "driver failed programming external connectivity on endpoint %s: Error starting userland proxy: %v", name, err)
	}
	if err != nil {
		return nil, nothing, fmt.Errorf("choose ports for container %s: %w", name, err)
	}
	for i, o := range open {
		if chosen[i] != 0 {
			c.ports[o.key][o.at].HostPort = strconv.Itoa(int(chosen[i]))
		}
	}
	if b, err = c.body(); err != nil {
		release()
		return nil, nothing, fault.As(fault.Invalid, err)
	}
	return b, unless(release), nil
}
