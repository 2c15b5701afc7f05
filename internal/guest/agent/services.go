package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/hutch-run/hutch/internal/guest/boot"
	"github.com/hutch-run/hutch/internal/guest/kubernetes"
	"github.com/hutch-run/hutch/internal/guest/modules"
	"github.com/hutch-run/hutch/internal/guest/ports"
	"github.com/hutch-run/hutch/internal/guest/process"
	"github.com/hutch-run/hutch/internal/guest/quiesce"
	"github.com/hutch-run/hutch/internal/guest/runtime"
	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// servicesDir tells the next server of this boot which services run. It is on a
// tmpfs that only root may enter.
const servicesDir = "/run/hutch/services"

// clusterMark tells a stop that there may be something to clean up.
const clusterMark = servicesDir + "/kubernetes.mark"

// newConsole returns the log for what happens once in a machine's life, such
// as its end.
func newConsole() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

// buildServices makes the parts that run services. They do nothing until
// somebody asks, unless a server before left some running.
func (a *agent) buildServices() {
	a.services = supervise.New(supervise.Params{Cgroups: boot.ServiceCgroup, Dir: servicesDir, Gate: a.quiet, Log: a.console})
	a.runtime = runtime.New(runtime.Params{Supervisor: a.services, Env: a.identity.Env, Log: a.log, Started: func() {
		a.ports.Start("docker", ports.NewDocker(dockerSocket, a.log))
	}})
	if a.identity.restarted && a.runtime.Left() {
		if err := a.runtime.Define(); err != nil {
			a.log.Warn("take services over", "error", err)
		}
	}
	a.cluster = kubernetes.New(kubernetes.Params{
		Units: a.services, Mark: clusterMark, Log: a.log,
		Needs: func(string) error { return a.runtime.Define() },
		Asked: func() { a.ports.Start(ports.APIOwner, ports.NewKubernetes(a.awaitAPI, a.log)) },
		Machine: kubernetes.System{
			Cgroups: boot.CgroupRoot, Own: boot.ServiceCgroup + "/kubernetes-reset", Modules: modules.Load,
		},
	})
	if a.identity.restarted {
		if err := a.cluster.Recover(); err != nil {
			a.log.Warn("take the cluster over", "error", err)
		}
	}
}

// awaitAPI gives the API of the cluster to those who watch what it publishes.
func (a *agent) awaitAPI(ctx context.Context) (ports.API, error) {
	api, err := a.cluster.WaitAPI(ctx)
	if err != nil {
		return ports.API{}, err
	}
	return ports.API{Gone: api.Gone(), Get: api.Get}, nil
}

// logs follows the logs of services, of those too that nobody has started.
type logs struct{ a *agent }

// Follow implements rpc.Logs.
func (l logs) Follow(ctx context.Context, service string, tail int, follow bool, send func(supervise.Chunk) error) error {
	define := l.a.runtime.Define
	if service == kubernetes.UnitName {
		define = l.a.cluster.Define
	}
	if err := define(); err != nil {
		return err
	}
	return l.a.services.Follow(ctx, service, tail, follow, send)
}

// stopper ends what runs: services first, in their order, then the programs of
// users. Those of a guest that is still can't hear that they should, and get no
// time for it.
type stopper struct {
	services *supervise.Supervisor
	table    *process.Table
	quiet    *quiesce.Quiet
	console  *slog.Logger
}

// Of the time for all, services get four fifths: the rest stays for programs,
// however long services take.
const serviceShare, allShares = 4, 5

// Shutdown implements power.Stopper.
func (s stopper) Shutdown(ctx context.Context, grace time.Duration) error {
	if s.quiet.Still() {
		grace = 0
	}
	deadline := time.Now().Add(grace)
	var err error
	if s.services.Wanted() {
		err = s.services.Shutdown(ctx, grace*serviceShare/allShares)
	}
	left := max(0, time.Until(deadline))
	s.console.Info("stopping programs", "within", left.Round(time.Millisecond))
	return errors.Join(err, s.table.Shutdown(ctx, left))
}
