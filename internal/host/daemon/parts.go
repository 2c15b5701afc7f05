package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/hutch-run/hutch/internal/host/disk"
	"github.com/hutch-run/hutch/internal/host/dockersock"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/metrics"
	"github.com/hutch-run/hutch/internal/host/network"
	"github.com/hutch-run/hutch/internal/host/ports"
	"github.com/hutch-run/hutch/internal/host/share"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/host/store"
	"github.com/hutch-run/hutch/internal/host/template"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
	"github.com/hutch-run/hutch/internal/version"
)

// warmRest is how long a machine that was made to be copied is left alone
// first. A guest's kernel does much in its first seconds that every copy would
// do otherwise: a link that comes up, addresses of IPv6, disks that fall idle.
const warmRest = 3 * time.Second

// parts is every part of the host side, built in the order of the fields.
type parts struct {
	cfg Config
	log *slog.Logger

	store     *store.Store
	events    *events.Log
	disks     *disk.Disks
	snapshots *snapshot.Store
	templates *template.Store
	kernels   *kernel.Store
	network   *network.Network
	jail      *jail.Jail
	driver    *qemu.Driver
	metrics   *metrics.Metrics
	sandboxes *lifecycle.Manager
	ports     *ports.Table
	docker    *dockersock.Sockets
	shares    *share.Virtiofs

	// closing ends what was built, last first.
	closing undo.Stack
}

// build makes all parts. On error those already made are ended again.
func build(ctx context.Context, cfg Config, log *slog.Logger) (*parts, error) {
	p := &parts{cfg: cfg, log: log}
	for _, step := range []func(context.Context) error{
		p.openStore, p.openKernels, p.openNetwork, p.openDriver, p.openSandboxes, p.openPorts, p.openDocker,
	} {
		err := step(ctx)
		if cause := context.Cause(ctx); err == nil && cause != nil {
			err = fmt.Errorf("start hutchd: %w", cause)
		}
		if err != nil {
			return nil, errors.Join(err, p.closing.Run(ctx))
		}
	}
	return p, nil
}

func (p *parts) openStore(context.Context) error {
	if err := os.MkdirAll(p.cfg.RunDir, 0o711); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	var err error
	if p.store, err = store.Open(p.cfg.Root, p.log); err != nil {
		return err
	}
	p.closing.Add("close store", func(context.Context) error { return p.store.Close() })
	if p.events, err = events.Open(events.Params{Dir: p.store.EventsDir(), Log: p.log}); err != nil {
		return err
	}
	p.closing.Add("close events", func(context.Context) error { return p.events.Close() })
	p.disks = disk.New(disk.Params{BlankDir: p.store.BlankDir(), Log: p.log})
	p.closing.Add("close disks", func(context.Context) error { p.disks.Close(); return nil })
	if p.snapshots, err = snapshot.NewStore(p.store.SnapshotsDir()); err != nil {
		return err
	}
	p.templates, err = openTemplates(p.cfg, p.log)
	return err
}

// openKernels makes the kernel pack fit the agent that is installed now.
func (p *parts) openKernels(context.Context) error {
	var err error
	if p.kernels, err = kernel.Open(p.cfg.Root); err != nil {
		return err
	}
	_, err = p.kernels.Refresh(p.cfg.Agent)
	return err
}

func (p *parts) openNetwork(ctx context.Context) error {
	var resolvers []netip.Addr
	for _, s := range p.cfg.Slots.DNS {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return fmt.Errorf("slots.dns: %w", err)
		}
		resolvers = append(resolvers, a)
	}
	var err error
	p.network, err = network.Open(ctx, network.Params{
		Root: p.cfg.Root, Dir: filepath.Join(p.cfg.RunDir, "netns"), Resolvers: resolvers, Logger: p.log,
	})
	if err != nil {
		return err
	}
	p.closing.Add("close network", p.network.Close)
	return nil
}

func (p *parts) openDriver(ctx context.Context) error {
	var err error
	if p.jail, err = jail.New(jail.Params{Parent: "hutch-" + rootTag(p.cfg.Root), Logger: p.log}); err != nil {
		return err
	}
	p.closing.Add("close jail", func(context.Context) error {
		// The parent cgroup stays when sandboxes do.
		if err := p.jail.Close(); err != nil {
			p.log.Debug("keep the parent cgroup", "reason", err)
		}
		return nil
	})
	p.driver, err = qemu.New(ctx, qemu.Params{
		Jail: p.jail, Accel: qemu.Accel(p.cfg.Accel), Logger: p.log,
		Hide: []string{p.cfg.Root, p.cfg.RunDir, "/root", "/home", "/etc/hutch"},
	})
	return err
}

// rootTag tells two roots on one host apart, in names that are short.
func rootTag(root string) string {
	sum := sha256.Sum256([]byte(root))
	return hex.EncodeToString(sum[:4])
}

func (p *parts) openSandboxes(ctx context.Context) error {
	p.metrics = metrics.New(metrics.Params{Version: version.Version, Snapshot: p.levels})
	l := p.cfg.Limits
	starts := l.MaxStarts
	if starts == 0 {
		starts = max(2, runtime.NumCPU())
	}
	p.shares = share.New(ctx, share.Params{
		Jail: p.jail, Allow: p.cfg.Shares.Allow, Deny: []string{p.cfg.Root, p.cfg.RunDir, "/etc/hutch", "/proc", "/sys", "/dev"}, Logger: p.log,
	})
	var err error
	p.sandboxes, err = lifecycle.New(lifecycle.Params{
		Driver: p.driver, Slots: p.network, Records: p.store, Memories: p.store, Disks: p.disks, Templates: p.templates,
		Events: meteredEvents{p.events, p.metrics},
		Kernel: p.kernels.Current, OldKernel: p.kernels.Get, Snapshots: p.snapshots,
		Warm:   lifecycle.Warm{Auto: p.cfg.Warm.Auto, MemoryMB: p.cfg.Warm.MemoryMB, DiskMB: p.cfg.Warm.DiskMB, Spares: p.cfg.Warm.Spares, Rest: warmRest},
		Shares: p.shares,
		Connect: func(vm vmm.VM, log *slog.Logger) guestconn.Guest {
			return guestconn.New(guestconn.Params{Dial: vm.DialLink, Done: vm.Done(), Log: log})
		},
		Capacity: func() (lifecycle.Capacity, error) { return capacity(p.cfg.Root) },
		ReclaimJails: func(ctx context.Context, live func(sandbox.ID) bool) error {
			_, err := p.jail.Reclaim(ctx, func(name string) bool { return live(share.Owner(name)) })
			return err
		},
		Cmdline: "quiet", RunDir: p.cfg.RunDir, DNS: p.network.DNS(), Log: p.log,
		Limits: lifecycle.Limits{
			MaxSandboxes: l.MaxSandboxes, MaxStarts: starts, MaxQueue: l.MaxQueue, MaxMemoryMB: l.MaxMemoryMB,
			MinFreeMemoryMB: l.MinFreeMemoryMB, MinFreeDiskMB: l.MinFreeDiskMB,
		},
	})
	return err
}

// levels is what metrics reads at a scrape.
func (p *parts) levels() metrics.Levels {
	l := metrics.Levels{Sandboxes: map[sandbox.State]int{}}
	for _, v := range p.sandboxes.List() {
		l.Sandboxes[v.State]++
	}
	l.SlotsUsed, l.SlotsTotal = p.network.Usage()
	return l
}

// meteredEvents counts events on their way to the log.
type meteredEvents struct {
	log     *events.Log
	metrics *metrics.Metrics
}

// Append keeps and counts e.
func (m meteredEvents) Append(e sandbox.Event) sandbox.Event {
	m.metrics.EventHappened(e.Cause)
	return m.log.Append(e)
}
