package dockersock

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/relay"
)

// Bounds of what a guest may say of a container.
const (
	maxInspect  = 4 << 20
	maxBindings = 1024
	maxName     = 128
)

var (
	startPath   = regexp.MustCompile(`^(/v[0-9.]+)?/containers/([^/]+)/(?:start|restart)$`)
	containerID = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// starting is a request to start a container.
type starting struct {
	version   string // "/v1.41", or nothing
	container string // as the caller names it
}

// startOf returns what r starts, if it starts a container.
func startOf(r *http.Request) (starting, bool) {
	m := startPath.FindStringSubmatch(r.URL.Path)
	if r.Method != http.MethodPost || m == nil {
		return starting{}, false
	}
	return starting{m[1], m[2]}, true
}

// container is what the daemon says of one, as far as it is asked.
type container struct {
	ID         string `json:"Id"`
	Name       string
	HostConfig struct {
		NetworkMode  string
		PortBindings map[string][]hostPort
	}
}

// hostPort is one port of the host as a container asks for it.
type hostPort struct {
	HostIP   string `json:"HostIp"`
	HostPort string // a number, a range ("8000-8010"), or empty
}

// understood reports whether the daemon takes the address.
func (p hostPort) understood() bool {
	_, err := netip.ParseAddr(p.HostIP)
	return p.HostIP == "" || err == nil
}

// ownNetwork reports whether a container of this network mode has ports of its
// own to publish.
func ownNetwork(mode string) bool {
	return mode != "host" && mode != "none" && !strings.HasPrefix(mode, "container:")
}

// parsePort reads the port of a container ("80/tcp"), as far as it can be
// published: sctp leads nowhere.
func parsePort(s string) (number uint16, protocol string, ok bool) {
	digits, protocol, _ := strings.Cut(s, "/")
	n, err := strconv.ParseUint(digits, 10, 16)
	protocol = cmp.Or(protocol, "tcp")
	return uint16(n), protocol, err == nil && n != 0 && (protocol == "tcp" || protocol == "udp")
}

// reserve takes the ports of the host that a container asks for. Its error is
// that of the daemon for a port that is taken. The returned function hears
// whether the daemon started the container then.
func (d *door) reserve(ctx context.Context, g guestconn.Guest, s starting) (worked func(bool), err error) {
	if d.s.p.Ports == nil {
		return nothing, nil
	}
	c, err := d.inspect(ctx, g, s)
	if err != nil || c == nil {
		return nothing, err
	}
	bindings, err := c.bindings()
	if err != nil || len(bindings) == 0 {
		return nothing, err
	}
	release, err := d.s.p.Ports.Reserve(ctx, d.id, c.ID, c.Name, bindings)
	if fault.Is(err, fault.Exists) {
		return nothing, fault.New(fault.Internal,
			"driver failed programming external connectivity on endpoint %s (%s): Error starting userland proxy: %v", c.Name, c.ID, err)
	}
	if err != nil {
		return nothing, fmt.Errorf("reserve ports for container %s: %w", c.Name, err)
	}
	return unless(release), nil
}

// unless makes a release of what is reserved one that hears whether it worked
// what that was for.
func unless(release func()) (worked func(bool)) {
	return func(ok bool) {
		if !ok {
			release()
		}
	}
}

func nothing(bool) {}

// inspect asks the daemon for a container, nil when it does not say: then it has
// its reason to tell the caller, too.
func (d *door) inspect(ctx context.Context, g guestconn.Guest, s starting) (*container, error) {
	var c container
	found, err := d.get(ctx, g, s.version+"/containers/"+url.PathEscape(s.container)+"/json", &c)
	if err != nil || !found {
		return nil, err
	}
	if !containerID.MatchString(c.ID) {
		return nil, fault.New(fault.Unavailable, "ask sandbox %s for the container's ports: it names container %.64q", d.id, c.ID)
	}
	c.Name = readable(strings.TrimPrefix(c.Name, "/"))
	return &c, nil
}

// get asks the daemon for what is at a path. It is not found when the daemon
// answers anything but 200.
func (d *door) get(ctx context.Context, g guestconn.Guest, path string, answer any) (found bool, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return false, fault.As(fault.Invalid, err)
	}
	conn, err := d.dial(ctx, g)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	res, err := relay.Transport(once(conn)).RoundTrip(r)
	if err != nil {
		return false, fault.New(fault.Unavailable, "ask sandbox %s for the container's ports: %w", d.id, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return false, nil
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxInspect)).Decode(answer); err != nil {
		return false, fault.New(fault.Unavailable, "ask sandbox %s for the container's ports: %w", d.id, err)
	}
	return true, nil
}

// readable makes a guest's words fit to be shown.
func readable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '.'
		}
		return r
	}, strings.ToValidUTF8(s[:min(len(s), maxName)], "."))
}

// bindings returns the ports of the host that the container asks for by number.
// Of a range, and of no number, the daemon chooses when it starts it.
func (c *container) bindings() ([]Binding, error) {
	if !ownNetwork(c.HostConfig.NetworkMode) {
		return nil, nil
	}
	var all []Binding
	for key, asked := range c.HostConfig.PortBindings {
		inside, protocol, ok := parsePort(key)
		if !ok {
			continue
		}
		for _, a := range asked {
			port, err := strconv.ParseUint(a.HostPort, 10, 16)
			if err != nil || port == 0 || !a.understood() {
				continue
			}
			all = append(all, Binding{Protocol: protocol, HostIP: a.HostIP, HostPort: uint16(port), ContainerPort: inside})
		}
	}
	if len(all) > maxBindings {
		return nil, tooMany(c.Name, len(all))
	}
	slices.SortFunc(all, func(a, b Binding) int {
		return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.HostIP, b.HostIP))
	})
	return all, nil
}

func tooMany(name string, ports int) error {
	return fault.New(fault.Exhausted, "container %s publishes %d ports, of which a sandbox has %d", name, ports, maxBindings)
}
