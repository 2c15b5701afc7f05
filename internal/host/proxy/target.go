package proxy

import (
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// SandboxHeader names the sandbox whose guest API a request with a plain path
// is for.
const SandboxHeader = "Hutch-Sandbox"

// Routes that are no RPC, as they are asked about in Params.Authorize.
const (
	RouteGuestHealth = "guest /health"
	RouteGuestFiles  = "guest /files"
	RouteGuestPort   = "guest port"
	RouteGuestTunnel = "guest tunnel"
	RouteGuestDocker = "guest docker"
)

// pathRoot is where sandboxes are in the path form.
const pathRoot = "/sandboxes/"

// kind is how a request is carried to its guest.
type kind uint8

const (
	guestAPI kind = iota + 1
	pathPort      // a port, addressed by path
	hostPort      // a port, addressed by host name
	tunnel
	dockerTunnel
)

// Where CONNECT leads to the Docker of a sandbox: "ID.docker:2375". (As the port
// of an id only a number is a port.)
const (
	dockerSuffix = ".docker"
	dockerPort   = "2375"
)

// target is what a request addresses.
type target struct {
	kind kind
	// id is as the caller wrote it: an id, or a prefix unless whole is set.
	id    string
	whole bool
	port  uint16 // but for guestAPI
	// prefix is what was taken off the path.
	prefix string
	// path is the rest, escaped, for the guest.
	path string
	// route is what the caller must be allowed.
	route string
}

// services lists the guest's services that may be called from outside.
func services() map[string]bool {
	return map[string]bool{
		"arcbox.v1.AgentService": true,
		"process.Process":        true,
		"filesystem.Filesystem":  true,
	}
}

// Match reports whether r is addressed to a sandbox, well or badly.
func (p *Proxy) Match(r *http.Request) bool {
	if r.Method == http.MethodConnect || p.hostLabel(r.Host) != "" {
		return true
	}
	return r.URL.Path+"/" == pathRoot || strings.HasPrefix(r.URL.Path, pathRoot) || len(r.Header.Values(SandboxHeader)) > 0
}

// hostLabel returns what stands before the domain in a host that has the shape
// of a port host, else "". The last label decides, so that no name below a
// port host reaches the API either.
func (p *Proxy) hostLabel(host string) string {
	name := strings.TrimSuffix(strings.ToLower(hostName(host)), ".")
	label, ok := strings.CutSuffix(name, "."+p.domain)
	if !ok {
		return ""
	}
	last := label[strings.LastIndexByte(label, '.')+1:]
	digits, _, dash := strings.Cut(last, "-")
	if !dash || digits == "" || strings.Trim(digits, "0123456789") != "" {
		return ""
	}
	return label
}

// parse reads the address of r.
func (p *Proxy) parse(r *http.Request) (target, error) {
	if r.Method == http.MethodConnect {
		return p.parseTunnel(r)
	}
	path := r.URL.EscapedPath()
	if label := p.hostLabel(r.Host); label != "" {
		id, port, err := parseLabel(label)
		if err != nil {
			return target{}, err
		}
		if port == p.apiPort {
			return p.api(target{id: id, whole: true, path: path})
		}
		if path == "" {
			path = "/" // "GET http://8080-sb.localhost", as to a forward proxy
		}
		return target{kind: hostPort, id: id, whole: true, port: port, path: path, route: RouteGuestPort}, nil
	}
	if rest, ok := strings.CutPrefix(path, pathRoot); ok {
		return p.parsePath(rest)
	}
	if ids := r.Header.Values(SandboxHeader); len(ids) == 1 {
		return p.api(target{id: ids[0], path: path})
	}
	if len(r.Header.Values(SandboxHeader)) > 1 {
		return target{}, fault.BadField(SandboxHeader, "is there more than once")
	}
	return target{}, fault.New(fault.NotFound, "%q names no sandbox; use /sandboxes/ID/...", clip(path))
}

// parsePath reads "ID/..." as it is escaped in the path. Only the plain form
// of an id, of "ports" and of a port number counts, so that no other reading of
// the same path can lead somewhere else.
func (p *Proxy) parsePath(rest string) (target, error) {
	id, rest, _ := strings.Cut(rest, "/")
	after, ok := strings.CutPrefix(rest, "ports/")
	if !ok {
		return p.api(target{id: id, prefix: pathRoot + id, path: "/" + rest})
	}
	number, _, _ := strings.Cut(after, "/")
	port, err := parsePort(number)
	if err != nil {
		return target{}, err
	}
	path := strings.TrimPrefix(after, number)
	if path == "" {
		path = "/"
	}
	return target{
		kind: pathPort, id: id, port: port, path: path, route: RouteGuestPort,
		prefix: pathRoot + id + "/ports/" + number,
	}, nil
}

// parseTunnel reads the authority of a CONNECT: "ID:PORT", "PORT-ID.DOMAIN:80" or
// "ID.docker:2375".
func (p *Proxy) parseTunnel(r *http.Request) (target, error) {
	t := target{kind: tunnel, route: RouteGuestTunnel}
	host, number, err := net.SplitHostPort(r.Host)
	if err != nil || r.URL.Path != "" {
		return t, fault.New(fault.Invalid, "CONNECT to %q: use ID:PORT", clip(r.Host))
	}
	if label := p.hostLabel(host); label != "" {
		if number != "80" && number != "443" {
			return t, fault.New(fault.Invalid, "CONNECT to %q: the port of the sandbox is in its name; use :80", clip(r.Host))
		}
		t.whole = true
		t.id, t.port, err = parseLabel(label)
		return t, err
	}
	t.id = strings.ToLower(host)
	if id, ok := strings.CutSuffix(t.id, dockerSuffix); ok {
		if number != dockerPort {
			return t, fault.New(fault.Invalid, "CONNECT to %q: use :%s for Docker", clip(r.Host), dockerPort)
		}
		t.kind, t.id, t.route = dockerTunnel, id, RouteGuestDocker
		return t, nil
	}
	t.port, err = parsePort(number)
	return t, err
}

// parseLabel reads "PORT-ID".
func parseLabel(label string) (id string, port uint16, err error) {
	number, id, _ := strings.Cut(label, "-")
	if port, err = parsePort(number); err != nil {
		return "", 0, err
	}
	return id, port, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '0' || s[0] == '+' {
		return 0, fault.BadField("port", "%q is no port; use 1 to 65535", clip(s))
	}
	return uint16(n), nil
}

// The plain paths of guest APIs: no escapes, no dots that move.
var (
	rpcPath   = regexp.MustCompile(`^/([a-z][a-z0-9]*(?:\.[A-Za-z][A-Za-z0-9]*)+)/[A-Za-z][A-Za-z0-9]*$`)
	filesPath = regexp.MustCompile(`^/files(?:/[a-z][a-z0-9_-]*)*$`)
)

// api completes t, whose path is set, for a guest API. Only what is on the
// list passes.
func (p *Proxy) api(t target) (target, error) {
	t.kind = guestAPI
	if m := rpcPath.FindStringSubmatch(t.path); m != nil && p.services[m[1]] {
		t.route = t.path
		return t, nil
	}
	switch {
	case t.path == "/health":
		t.route = RouteGuestHealth
	case filesPath.MatchString(t.path):
		t.route = RouteGuestFiles
	default:
		return t, fault.New(fault.NotFound,
			"%q is no API of a guest; there are process.Process, filesystem.Filesystem, arcbox.v1.AgentService, /files, /health, and ports/PORT/...", clip(t.path))
	}
	return t, nil
}

// resolve returns the id of the sandbox that t addresses.
func (p *Proxy) resolve(t target) (sandbox.ID, error) {
	if t.whole {
		id, err := sandbox.ParseID(t.id)
		if err != nil {
			return "", fault.BadField("sandbox_id", "%v", err)
		}
		return id, nil
	}
	if len(t.id) > sandbox.MaxIDLen || t.id == "" || strings.Trim(t.id, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return "", fault.BadField("sandbox_id", "%q is no sandbox id, nor the beginning of one", clip(t.id))
	}
	view, err := p.sandboxes.Get(t.id)
	if err != nil {
		return "", err
	}
	return view.ID, nil
}

// outURL is where the request for t goes; host stands for the guest.
func (t target) outURL(host, query string) (*url.URL, error) {
	path, err := url.PathUnescape(t.path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "path: %w", err)
	}
	return &url.URL{Scheme: "http", Host: host, Path: path, RawPath: t.path, RawQuery: query}, nil
}

// CrossOrigin reports whether r may come from a web page of another origin on
// a listener without tokens. Web servers in guests may be read by any page, as
// far as they allow it themselves, and written by the pages of their own
// sandbox. Guest APIs are for no page.
func (p *Proxy) CrossOrigin(r *http.Request) bool {
	t, err := p.parse(r)
	if err != nil {
		return false
	}
	safe := (r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions) && r.Header.Get("Upgrade") == ""
	switch t.kind {
	case pathPort:
		return safe
	case hostPort:
		return safe || p.sameSandbox(r.Header.Get("Origin"), t.id)
	case guestAPI, tunnel, dockerTunnel:
		return false
	}
	return false
}

// sameSandbox reports whether origin is a port host of sandbox id.
func (p *Proxy) sameSandbox(origin, id string) bool {
	u, err := url.Parse(origin)
	if err != nil {
		return false
	}
	from, _, err := parseLabel(p.hostLabel(u.Host))
	return err == nil && from == id
}

// hostName returns the host of a "host" or "host:port" header value.
func hostName(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return host
}

// clip shortens what a stranger sent for an error message.
func clip(s string) string {
	const limit = 100
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
