package rpc

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"connectrpc.com/grpchealth"
	"connectrpc.com/grpcreflect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/auth"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/proxy"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/rpcx/validate"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// MaxSend bounds one message from hutchd, in bytes: two streams of
// MaxExecOutput in the base64 of JSON, and room for the rest. Clients of Exec
// set their read limit to it.
const MaxSend = 24 << 20

// metricsPath is where Prometheus reads.
const metricsPath = "/metrics"

// Params is what New needs. All fields are needed but those that say otherwise.
type Params struct {
	Sandboxes lifecycle.Sandboxes
	Templates Templates
	Snapshots Snapshots
	Ports     Ports
	Docker    Docker // may be nil
	Host      Host
	// Subscribe opens the event log at a cursor.
	Subscribe func(after int64) (*events.Reader, error)
	// LogPath is where a log of a sandbox is, a file that grows at its end and
	// moves to the same name with ".1" when it is full.
	LogPath func(id sandbox.ID, source LogSource) string
	Stats   func(ctx context.Context, id sandbox.ID) (Stats, error)
	// Trim is lifecycle's Manager.Trim.
	Trim func(ctx context.Context, id sandbox.ID) (lifecycle.Trimmed, error)

	// Tokens open the API over TCP. Empty: see auth.
	Tokens []auth.Token
	// Domain is that of port hosts. Default: auth.DefaultDomain.
	Domain string
	// MaxProxyConns bounds what is in flight to one sandbox. Default:
	// proxy.DefaultMaxConns.
	MaxProxyConns int

	Meter      Meter        // may be nil
	ProxyMeter proxy.Meter  // may be nil
	Metrics    http.Handler // serves /metrics; may be nil
	Log        *slog.Logger
}

// API is everything that hutchd serves, as one handler.
type API struct {
	handler http.Handler
	proxy   *proxy.Proxy
	drain   context.CancelCauseFunc
}

// errStopping ends what only waits when hutchd stops.
var errStopping = fault.New(fault.Unavailable, "hutchd is stopping")

// New assembles the API.
func New(p Params) (*API, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	if p.Meter == nil {
		p.Meter = noMeter{}
	}
	if p.Domain == "" {
		p.Domain = auth.DefaultDomain
	}
	draining, drain := context.WithCancelCause(context.Background())
	a := &API{drain: drain}
	deny := newRefusal(p.Log)
	who, err := auth.New(auth.Params{
		Tokens: p.Tokens, Domain: p.Domain, Deny: deny,
		CrossOrigin: func(r *http.Request) bool { return a.proxy.Match(r) && a.proxy.CrossOrigin(r) },
	})
	if err != nil {
		return nil, err
	}
	a.proxy, err = proxy.New(proxy.Params{
		Sandboxes: p.Sandboxes, Authorize: who.Authorize, Domain: p.Domain,
		Docker: p.serveDocker(), MaxConns: p.MaxProxyConns, Meter: p.ProxyMeter, Log: p.Log,
	})
	if err != nil {
		return nil, err
	}
	services, err := newServices(p, who, draining)
	if err != nil {
		return nil, err
	}
	if p.Metrics != nil {
		services[metricsPath] = who.Require(auth.RouteMetrics, p.Metrics)
	}
	a.handler = who.Middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch h, ok := services[serviceOf(r.URL.Path)]; {
		case a.proxy.Match(r):
			a.proxy.ServeHTTP(w, r)
		case ok:
			h.ServeHTTP(w, r)
		default:
			deny(w, r, fault.New(fault.NotFound, "nothing is served at %q", clip(r.URL.Path)))
		}
	}))
	return a, nil
}

func (p Params) check() error {
	if p.Sandboxes == nil || p.Templates == nil || p.Snapshots == nil || p.Ports == nil || p.Host == nil || p.Subscribe == nil ||
		p.LogPath == nil || p.Stats == nil || p.Trim == nil || p.Log == nil {
		return errors.New("rpc: a needed field of Params is not set")
	}
	return nil
}

// serveDocker returns what serves tunnels to Docker, nil where nothing does.
func (p Params) serveDocker() func(sandbox.ID, net.Conn) error {
	if p.Docker == nil {
		return nil
	}
	return p.Docker.Serve
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.handler.ServeHTTP(w, r) }

// Drain ends calls that only wait or follow (events, logs, WaitSandbox) and
// refuses new ones, so that http.Server.Shutdown need not wait for them.
// NewServer arranges that Shutdown calls it.
func (a *API) Drain() { a.drain(errStopping) }

// Close ends what is proxied, tunnels and upgraded connections included, and
// waits for it. Call it after, or at the deadline of, http.Server.Shutdown.
func (a *API) Close() error {
	a.Drain()
	return a.proxy.Close()
}

// newServices returns the handlers by "/package.Service/".
func newServices(p Params, who *auth.Authenticator, draining context.Context) (map[string]http.Handler, error) {
	rules, err := validate.New(&hostagentv1.CreateSandboxRequest{}, &hostagentv1.ExecRequest{})
	if err != nil {
		return nil, err
	}
	options := connect.WithHandlerOptions(append(
		rpcx.HandlerOptions(p.Log, who.Interceptor(), rules), connect.WithSendMaxBytes(MaxSend))...)
	names := []string{
		hostagentv1connect.HostAgentServiceName, hostagentv1connect.SandboxServiceName,
		hostagentv1connect.TemplateServiceName, hostagentv1connect.SnapshotServiceName, hostagentv1connect.HostServiceName,
		hostagentv1connect.PortServiceName,
	}
	reflector := grpcreflect.NewStaticReflector(append(names, grpchealth.HealthV1ServiceName)...)
	services := map[string]http.Handler{}
	mount := func(path string, h http.Handler) { services[path] = h }
	mount(hostagentv1connect.NewHostAgentServiceHandler(&hostAgent{p.Sandboxes, p.Docker, p.Meter}, options))
	mount(hostagentv1connect.NewSandboxServiceHandler(&sandboxes{
		boxes: p.Sandboxes, docker: p.Docker, subscribe: p.Subscribe, logPath: p.LogPath, stats: p.Stats, trim: p.Trim, draining: draining,
	}, options))
	mount(hostagentv1connect.NewTemplateServiceHandler(&templates{p.Templates, p.Sandboxes, p.Snapshots}, options))
	mount(hostagentv1connect.NewSnapshotServiceHandler(&snapshots{p.Snapshots, p.Docker}, options))
	mount(hostagentv1connect.NewPortServiceHandler(&portList{p.Ports, p.Sandboxes}, options))
	mount(hostagentv1connect.NewHostServiceHandler(&host{p.Host, p.Sandboxes}, options))
	mount(grpchealth.NewHandler(grpchealth.NewStaticChecker(names...), options))
	mount(grpcreflect.NewHandlerV1(reflector, options))
	mount(grpcreflect.NewHandlerV1Alpha(reflector, options))
	return services, nil
}

// serviceOf returns what of a path chooses the handler: "/package.Service/" of
// an RPC, all of a path without a second slash.
func serviceOf(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i+1]
	}
	return path
}

// newRefusal returns what answers a refused request in the caller's protocol.
func newRefusal(log *slog.Logger) func(http.ResponseWriter, *http.Request, error) {
	writer := connect.NewErrorWriter()
	return func(w http.ResponseWriter, r *http.Request, err error) {
		if fault.Is(err, fault.Unauthenticated) {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := writer.Write(w, r, rpcx.ToConnect(err)); err != nil {
			log.DebugContext(r.Context(), "refusal not delivered", "err", err)
		}
	}
}

// clip shortens what a stranger sent for an error message.
func clip(s string) string {
	const limit = 100
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
