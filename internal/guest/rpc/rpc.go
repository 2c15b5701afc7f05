package rpc

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/guest/identity"
	"github.com/hutch-run/hutch/internal/guest/power"
	"github.com/hutch-run/hutch/internal/guest/sysinfo"
	"github.com/hutch-run/hutch/internal/rpcx"
)

// Clock takes the host's time; a *clock.Clock.
type Clock interface {
	Sync(host clock.HostTime) (clock.Result, error)
}

// Info describes the machine; a sysinfo.Reader.
type Info interface {
	Read() (sysinfo.Info, error)
}

// Power ends the machine and trims its disks; a *power.Power.
type Power interface {
	Shutdown(grace time.Duration)
	Trim(ctx context.Context) (power.Trimmed, error)
}

// Identity makes the guest a sandbox; an *identity.Identity.
type Identity interface {
	Configure(ctx context.Context, c identity.Config) (identity.Facts, error)
}

// Mapped reads files through mappings; a *mapped.Reader.
type Mapped interface {
	Read(ctx context.Context, path string, offset, length uint64) ([]byte, error)
}

// Mount is a handler of another package and where it belongs, a pattern of
// http.ServeMux.
type Mount struct {
	Path    string
	Handler http.Handler
}

// Params are the parts behind the handlers. All but Mounts and TestFeatures are needed.
type Params struct {
	Log     *slog.Logger
	Version string // of the agent
	Clock   Clock
	Info    Info
	Power   Power
	Mapped  Mapped
	Runtime Runtime
	Logs    Logs
	Ports   Ports
	// Kubernetes is the cluster.
	Kubernetes Kubernetes
	// TestFeatures reports whether what only tests need is on; nil: it is off.
	TestFeatures func() bool
	Mounts       []Mount
}

// New returns the handler of everything the guest agent serves by HTTP: its
// own service, the given mounts, and GET /health, which answers 204 without a
// body. Two mounts at one path panic, as http.ServeMux does.
func New(p Params) http.Handler {
	mux := http.NewServeMux()
	options := rpcx.HandlerOptions(p.Log)
	agent := Lazy("/"+arcboxv1connect.AgentServiceName+"/", func() http.Handler {
		_, handler := arcboxv1connect.NewAgentServiceHandler(&agentService{p}, append(options, mappedLimit())...)
		return handler
	})
	mux.Handle(agent.Path, agent.Handler)
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	})
	for _, m := range p.Mounts {
		mux.Handle(m.Path, m.Handler)
	}
	return mux
}
