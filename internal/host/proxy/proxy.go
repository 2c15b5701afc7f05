package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/relay"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Defaults of Params.
const (
	DefaultDomain   = "localhost"
	DefaultAPIPort  = 49983
	DefaultMaxConns = 1024
)

// Sandboxes is what the proxy needs of the sandboxes.
type Sandboxes interface {
	// Get returns a sandbox by its id or a prefix that names only one.
	Get(idOrPrefix string) (lifecycle.View, error)
	// Use holds a sandbox active, and gives its guest, until done is called.
	Use(ctx context.Context, id sandbox.ID) (g guestconn.Guest, done func(), err error)
}

// Meter counts what is in flight.
type Meter interface {
	ProxyStarted()
	ProxyEnded()
}

// Params is what New needs.
type Params struct {
	Sandboxes Sandboxes
	// Authorize says whether the caller in ctx may use route: a procedure, or
	// one of the Route constants.
	Authorize func(ctx context.Context, route string) error
	// Domain is that of port hosts. Default: DefaultDomain.
	Domain string
	// APIPort is the port that stands for the guest APIs in port hosts. A
	// server in a guest on that port is reached by the other forms. Default:
	// DefaultAPIPort.
	APIPort uint16
	// MaxConns bounds what is in flight to one sandbox. Default: DefaultMaxConns.
	MaxConns int
	// Docker serves a connection to the Docker of a sandbox, to its end. It holds
	// the sandbox active itself, for each request. nil: none is served.
	Docker func(id sandbox.ID, conn net.Conn) error
	// Meter may be nil.
	Meter Meter
	Log   *slog.Logger
}

// Proxy carries requests to guests. It is safe for concurrent use.
type Proxy struct {
	sandboxes Sandboxes
	authorize func(ctx context.Context, route string) error
	services  map[string]bool
	domain    string
	apiPort   uint16
	docker    func(sandbox.ID, net.Conn) error
	flights   *flights
	errors    *connect.ErrorWriter
	buffers   relay.Buffers
	log       *slog.Logger

	// open ends when Close is called, and everything in flight with it.
	open  context.Context
	close context.CancelFunc
}

// New returns a Proxy.
func New(p Params) (*Proxy, error) {
	if p.Sandboxes == nil || p.Authorize == nil || p.Log == nil {
		return nil, errors.New("proxy: Params lacks Sandboxes, Authorize or Log")
	}
	if p.Domain == "" {
		p.Domain = DefaultDomain
	}
	if p.APIPort == 0 {
		p.APIPort = DefaultAPIPort
	}
	if p.MaxConns == 0 {
		p.MaxConns = DefaultMaxConns
	}
	if p.MaxConns < 0 {
		return nil, fmt.Errorf("proxy: %d connections a sandbox; use at least 1", p.MaxConns)
	}
	open, stop := context.WithCancel(context.Background())
	return &Proxy{
		sandboxes: p.Sandboxes,
		authorize: p.Authorize,
		services:  services(),
		domain:    strings.ToLower(strings.Trim(p.Domain, ".")),
		apiPort:   p.APIPort,
		docker:    p.Docker,
		flights:   newFlights(p.MaxConns, p.Meter),
		errors:    connect.NewErrorWriter(),
		log:       p.Log,
		open:      open,
		close:     stop,
	}, nil
}

// Close ends everything in flight, waits for it, and refuses what comes later.
// http.Server.Shutdown does not know tunnels and upgraded connections: call
// Close as well.
func (p *Proxy) Close() error {
	p.close()
	p.flights.close()
	return nil
}

// visit is one request on its way.
type visit struct {
	target
	sandbox sandbox.ID
	guest   guestconn.Guest
	body    *relay.Body // nil: none
}

// ServeHTTP carries one request to its guest and the answer back.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel, body := relay.Caller(w, r)
	defer cancel()
	defer context.AfterFunc(p.open, cancel)()
	r = r.WithContext(ctx)

	t, err := p.parse(r)
	if err == nil {
		err = p.authorize(ctx, t.route)
	}
	if err != nil {
		p.refuse(w, r, err, "")
		return
	}
	id, err := p.resolve(t)
	if err != nil {
		p.refuse(w, r, err, p.failureOf(err))
		return
	}
	leave, err := p.flights.enter(id)
	if err != nil {
		p.refuse(w, r, err, TooMany)
		return
	}
	defer leave()
	if t.kind == dockerTunnel {
		p.tunnelDocker(w, r, id)
		return
	}
	g, done, err := p.sandboxes.Use(ctx, id)
	if err != nil {
		p.refuse(w, r, err, p.failureOf(err))
		return
	}
	defer done()
	p.carry(w, r, visit{target: t, sandbox: id, guest: g, body: body})
}

// carry sends r to the guest of v.
func (p *Proxy) carry(w http.ResponseWriter, r *http.Request, v visit) {
	if v.kind == tunnel {
		p.tunnel(w, r, v)
		return
	}
	if r.ContentLength != 0 {
		// Over HTTP/1.1, let the answer begin before the request has ended.
		// Writers that can't are HTTP/2, which always can.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	p.forward(w, r, v)
}
