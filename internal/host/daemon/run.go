package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/hutch-run/hutch/internal/host/auth"
	"github.com/hutch-run/hutch/internal/host/rpc"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
	"github.com/hutch-run/hutch/internal/version"
)

// Bounds of an orderly stop.
const (
	// drainTime is how long calls in flight may take to end by themselves.
	drainTime = 5 * time.Second
	// stopTime bounds letting go of, or powering off, all sandboxes.
	stopTime = 90 * time.Second
)

// Run is hutchd: it serves until ctx ends or a listener breaks, then stops in
// order. Sandboxes go on running unless the configuration says otherwise.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	p, err := build(ctx, cfg, log)
	if err != nil {
		return err
	}
	err = p.run(ctx)
	return errors.Join(err, p.closing.Run(ctx))
}

func (p *parts) run(ctx context.Context) error {
	started := time.Now()
	api, err := p.api(started)
	if err != nil {
		return err
	}
	listeners, err := p.listen(ctx)
	if err != nil {
		return errors.Join(err, api.Close())
	}
	server := rpc.NewServer(api, p.log)
	// Connections wait in the listeners' queues until the sandboxes of the
	// hutchd before are taken up.
	if err := p.sandboxes.Start(ctx); err != nil {
		return errors.Join(err, closeAll(listeners), api.Close(), p.stopSandboxes(ctx))
	}
	if err := p.templates.Reclaim(ctx); err != nil {
		p.log.Warn("reclaim unfinished builds", "error", err)
	}
	p.collect(ctx)
	if kernels, all := p.sandboxes.KernelsInUse(); !all {
		p.log.Warn("keep all kernel packs: a record that can't be read may name any of them")
	} else if err := p.kernels.Reclaim(kernels); err != nil {
		p.log.Warn("collect kernel packs", "error", err)
	}
	p.network.Prepare(p.cfg.Slots.Prepared)
	closePorts, err := p.followStates()
	if err == nil {
		if err = p.docker.Start(); err != nil {
			err = errors.Join(err, closePorts())
		}
	}
	if err != nil {
		return errors.Join(err, closeAll(listeners), api.Close(), p.stopSandboxes(ctx))
	}

	failed := make(chan error, len(listeners))
	var serving sync.WaitGroup
	for _, l := range listeners {
		serving.Go(func() {
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
		})
		p.log.Info("serving", "address", l.Addr().String())
	}
	p.ready(started)
	select {
	case <-ctx.Done():
		p.log.Info("stopping", "keep_vms", !p.cfg.StopVMs)
	case err = <-failed:
	}
	notify(p.log, systemd.SdNotifyStopping)
	err = errors.Join(err, p.drain(ctx, server, api))
	serving.Wait()
	return errors.Join(err, p.docker.Close(), closePorts(), p.stopSandboxes(ctx))
}

func (p *parts) ready(started time.Time) {
	caps := p.driver.Caps()
	p.log.Info("hutchd is ready", "version", version.Version, "root", p.cfg.Root, "vmm", caps.Name, "vmm_version", caps.Version,
		"accel", caps.Accel, "accel_reason", caps.AccelReason, "sandboxes", len(p.sandboxes.List()), "took", time.Since(started))
	notify(p.log, systemd.SdNotifyReady)
}

// notify tells systemd, where there is one.
func notify(log *slog.Logger, state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.Warn("notify systemd", "error", err)
	}
}

// drain ends serving: calls that can end soon do, the rest is cut off.
func (p *parts) drain(ctx context.Context, server *http.Server, api *rpc.API) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	err := server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		p.log.Warn("cut off calls that were still in flight")
		err = nil
	}
	err = errors.Join(err, api.Close())
	if closeErr := server.Close(); closeErr != nil && !errors.Is(closeErr, net.ErrClosed) {
		err = errors.Join(err, closeErr)
	}
	return err
}

func (p *parts) stopSandboxes(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	return p.sandboxes.Close(ctx, !p.cfg.StopVMs)
}

// collect removes images that nothing names any more. It is
// housekeeping: a failure is told and waits for the next time.
func (p *parts) collect(ctx context.Context) {
	ctx, cancel := undo.Detach(ctx)
	defer cancel()
	if _, all := p.sandboxes.ImagesInUse(); !all {
		p.log.Warn("keep all images: a record that can't be read may name any of them")
		return
	}
	used := func() map[string]bool {
		images, _ := p.sandboxes.ImagesInUse() // what is quarantined is so from the start
		return images
	}
	if _, err := p.templates.Collect(ctx, used); err != nil {
		p.log.Warn("collect images", "error", err)
	}
}

func (p *parts) api(started time.Time) (*rpc.API, error) {
	tokens, err := p.tokens()
	if err != nil {
		return nil, err
	}
	return rpc.New(rpc.Params{
		Sandboxes: p.sandboxes,
		Templates: templates{p},
		Snapshots: p.sandboxes,
		Ports:     p.ports,
		Docker:    p.docker,
		Host:      host{p, started},
		Subscribe: p.events.Subscribe,
		LogPath: func(id sandbox.ID, source rpc.LogSource) string {
			if source == rpc.VMMLog {
				return p.store.VMMLog(id)
			}
			return p.store.ConsoleLog(id)
		},
		Stats:  p.stats,
		Trim:   p.sandboxes.Trim,
		Tokens: tokens, Domain: p.cfg.Domain,
		Meter: p.metrics, ProxyMeter: p.metrics, Metrics: p.metrics.Handler(), Log: p.log,
	})
}

func (p *parts) tokens() ([]auth.Token, error) {
	if p.cfg.TokenFile == "" {
		return nil, nil
	}
	return auth.ReadTokenFile(p.cfg.TokenFile)
}

// listen opens every listener, or none.
func (p *parts) listen(ctx context.Context) (listeners []net.Listener, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(listeners))
			listeners = nil
		}
	}()
	var certificate *tls.Config
	if p.cfg.TLSCert != "" {
		if certificate, err = rpc.LoadTLS(p.cfg.TLSCert, p.cfg.TLSKey); err != nil {
			return nil, err
		}
	}
	for _, s := range p.cfg.Listen {
		address, err := rpc.ParseAddress(s)
		if err != nil {
			return listeners, err
		}
		l, err := rpc.Listen(ctx, rpc.ListenParams{
			Address: address, Group: p.cfg.SocketGroup, TLS: certificate, HasTokens: p.cfg.TokenFile != "",
		})
		if err != nil {
			return listeners, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

func closeAll(listeners []net.Listener) error {
	var errs []error
	for _, l := range listeners {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}
