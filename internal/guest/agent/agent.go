package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/guest/boot"
	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/guest/files"
	"github.com/hutch-run/hutch/internal/guest/files/filesrpc"
	"github.com/hutch-run/hutch/internal/guest/identity"
	"github.com/hutch-run/hutch/internal/guest/kubernetes"
	"github.com/hutch-run/hutch/internal/guest/mapped"
	"github.com/hutch-run/hutch/internal/guest/ports"
	"github.com/hutch-run/hutch/internal/guest/power"
	"github.com/hutch-run/hutch/internal/guest/process"
	"github.com/hutch-run/hutch/internal/guest/process/processrpc"
	"github.com/hutch-run/hutch/internal/guest/quiesce"
	"github.com/hutch-run/hutch/internal/guest/rpc"
	"github.com/hutch-run/hutch/internal/guest/runtime"
	"github.com/hutch-run/hutch/internal/guest/supervise"
	"github.com/hutch-run/hutch/internal/guest/sysinfo"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/version"
)

// dockerSocket is where dockerd listens.
const dockerSocket = "/run/docker.sock"

// memoryLimit keeps the server small: a guest may have no more than 128 MiB.
const memoryLimit = 20 << 20

// Serve runs the server until it breaks, or the machine ends. PID 1 starts it
// again.
func Serve() error {
	debug.SetMemoryLimit(memoryLimit)
	// The console is a slow wire, and the host keeps only its end: what is
	// ordinary is not told.
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	settle(log)
	a := &agent{
		log: log, console: newConsole(), built: make(chan struct{}), accounts: account.NewFiles("/"),
		clock: clock.New(clock.System(log), log), ports: ports.New(log),
	}
	a.identity = keepIdentity(identity.New(identity.Params{
		Kernel: identity.System(), Links: identity.NetlinkLinks(), Clock: a.clock, Log: log,
	}), defaultsFile, log)
	a.quiet = a.newQuiet()
	if a.identity.restarted {
		if err := a.quiet.Recover(); err != nil {
			log.Warn("take over from the server before", "error", err)
		}
	}
	// The host connects and configures while the rest of the boot goes on; its
	// requests wait to be accepted until that is over.
	listener, err := link.Listen(link.ListenParams{
		Open: a.openPort, DialTCP: a.dialTCP, DialUDP: a.dialUDP, Sockets: map[string]string{link.SocketDocker: dockerSocket},
		Hello: link.Hello{AgentVersion: version.Version}, Log: log,
		Calls: map[string]link.CallFunc{
			link.CallConfigure: rpc.Configure(version.Version, a), link.CallStart: a.start, link.CallQuiesce: rpc.Quiesce(a),
			link.CallClock: rpc.ReadClock(a.clock), link.CallPorts: rpc.TellPorts(a.ports),
		},
	})
	if err != nil {
		return fmt.Errorf("serve the link: %w", err)
	}
	err = boot.AwaitSettled()
	if err == nil {
		err = a.build()
	}
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	return a.run(listener)
}

// settle gives this process its name and makes the kernel spare it when memory
// runs out. Programs that it starts do not inherit the latter.
func settle(log *slog.Logger) {
	syscall.Umask(0o022)
	for file, value := range map[string]string{"/proc/self/comm": "hutch-agent", "/proc/self/oom_score_adj": "-1000"} {
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			log.Warn("settle", "file", file, "error", err)
		}
	}
}

// agent is the server's parts.
type agent struct {
	log      *slog.Logger
	console  *slog.Logger  // told what happens once, see newConsole
	away     atomic.Bool   // no host is connected
	built    chan struct{} // closed when all below is there
	accounts *account.Files
	clock    *clock.Clock
	identity *keptIdentity
	quiet    *quiesce.Quiet
	ports    *ports.Board
	table    *process.Table
	files    *files.Store
	services *supervise.Supervisor
	runtime  *runtime.Runtime
	cluster  *kubernetes.Cluster
	power    *power.Power
}

// start runs a program for the host itself, once the boot has settled.
func (a *agent) start(ctx context.Context, request []byte, send func([]byte) error) error {
	if err := a.awaitBuilt(ctx); err != nil {
		return err
	}
	return processrpc.Call(ctx, a.table, request, send)
}

func (a *agent) awaitBuilt(ctx context.Context) error {
	select {
	case <-a.built:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// build makes what the API is about.
func (a *agent) build() error {
	var err error
	if a.table, err = process.New(process.Params{
		Log: a.log, Accounts: a.accounts, Defaults: a.identity, CgroupRoot: boot.ProcessCgroup, Gate: a.quiet,
	}); err != nil {
		return err
	}
	if a.files, err = files.New(files.Params{Log: a.log, Accounts: a.accounts, Defaults: a.identity}); err != nil {
		return err
	}
	a.buildServices()
	stop := stopper{a.services, a.table, a.quiet, a.console}
	a.power = power.New(power.Params{Stopper: stop, Kernel: power.System(false), Log: a.console})
	close(a.built)
	return nil
}

// run serves the API on the link, and ends the machine when asked to.
func (a *agent) run(listener net.Listener) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	server := &http.Server{Handler: a.handler(), Protocols: new(http.Protocols), ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelDebug)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)

	var running sync.WaitGroup
	running.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			cancel(fmt.Errorf("serve the link: %w", err))
		}
	})
	running.Go(func() { cancel(a.power.Run(ctx)) })
	running.Go(func() { a.powerOnSignal(ctx) })
	<-ctx.Done()
	err := errors.Join(context.Cause(ctx), server.Close(), listener.Close())
	running.Wait()
	a.cluster.Close()
	a.services.Close()
	a.quiet.Close()
	a.ports.Close()
	return err
}

// powerOnSignal ends the machine when PID 1 forwards somebody's wish.
func (a *agent) powerOnSignal(ctx context.Context) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	defer signal.Stop(c)
	select {
	case <-c:
		a.power.Shutdown(0)
	case <-ctx.Done():
	}
}

// Where the services belong that are built by their first request; a test holds
// them to what the services say.
const (
	processPath = "/process.Process/"
	filesPath   = "/filesystem.Filesystem/"
)

func (a *agent) handler() http.Handler {
	options := rpcx.HandlerOptions(a.log)
	plain := filesrpc.NewHTTP(a.files, a.log)
	mounts := []rpc.Mount{{Path: "/files", Handler: plain}, {Path: "/files/", Handler: plain}}
	mounts = append(mounts, rpc.Lazy(processPath, func() http.Handler {
		_, handler := processrpc.New(a.table).Mount(options...)
		return handler
	}), rpc.Lazy(filesPath, func() http.Handler {
		_, handler := filesrpc.New(a.files).Mount(options...)
		return handler
	}))
	return rpc.New(rpc.Params{
		Log: a.log, Version: version.Version, Clock: a.clock, Info: sysinfo.Reader{Root: "/"},
		Power: a.power, Mapped: mapped.New("/"), TestFeatures: a.identity.TestFeatures, Mounts: mounts,
		Runtime: a.runtime, Logs: logs{a}, Ports: a.ports, Kubernetes: a.cluster,
	})
}
