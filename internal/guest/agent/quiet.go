package agent

import (
	"context"
	"io"
	"os"
	"runtime"
	"sync/atomic"

	"github.com/hutch-run/hutch/internal/guest/boot"
	"github.com/hutch-run/hutch/internal/guest/hooks"
	"github.com/hutch-run/hutch/internal/guest/identity"
	"github.com/hutch-run/hutch/internal/guest/quiesce"
	"github.com/hutch-run/hutch/internal/guest/shares"
	"github.com/hutch-run/hutch/internal/link"
)

const (
	// quietFile tells the next server of this boot that the guest is still.
	quietFile = "/run/hutch/frozen"
	// hookCgroup is below the agent's, the one that is not frozen.
	hookCgroup = boot.AgentCgroup + "/restore"
)

// ranEarly is the warning of a copy that was not still when it was configured.
const ranEarly = "programs ran in this copy before it was configured: they may have seen the identity, randomness and time of the original"

func (a *agent) newQuiet() *quiesce.Quiet {
	return quiesce.New(quiesce.Params{
		Cgroups: boot.CgroupRoot, Spare: boot.AgentCgroupName, Sync: quiesce.SyncDisk(boot.DataDir),
		Away: a.away.Load, Note: quietFile, Log: a.log,
	})
}

// Quiesce holds the guest still, once the boot has settled.
func (a *agent) Quiesce(ctx context.Context) (quiesce.Report, error) {
	if err := a.awaitBuilt(ctx); err != nil {
		return quiesce.Report{}, err
	}
	if err := a.identity.Prepare(); err != nil {
		a.log.Warn("prepare to be copied", "error", err)
	}
	runtime.GC()              // or each copy would soon have to
	_, _ = os.Stat(hooks.Dir) // most images have none, which the kernel then remembers
	return a.quiet.Quiesce(ctx)
}

// Configure configures the guest, and ends its stillness: in a copy after the
// hooks of the image have run.
func (a *agent) Configure(ctx context.Context, c identity.Config) (identity.Facts, error) {
	var facts identity.Facts
	err := a.quiet.Wake(ctx, c.BootID != "", func(still bool) (err error) {
		c.Still = still
		facts, err = a.identity.Configure(ctx, c)
		if err != nil || c.BootID == "" || (!still && !facts.Renamed) {
			return err
		}
		if !still {
			facts.Warnings = append(facts.Warnings, ranEarly)
		}
		warnings, err := hooks.Run(ctx, hooks.Params{Dir: hooks.Dir, Cgroup: hookCgroup, Accounts: a.accounts, Log: a.log})
		facts.Warnings = append(facts.Warnings, warnings...)
		return err
	})
	if err == nil {
		facts.ShareErrors, err = a.mountShares(ctx, c.Shares)
	}
	return facts, err
}

// mountShares mounts once the boot has settled, which brings the modules.
func (a *agent) mountShares(ctx context.Context, all []shares.Share) (problems []string, err error) {
	if len(all) == 0 {
		return nil, nil
	}
	if err := a.awaitBuilt(ctx); err != nil {
		return nil, err
	}
	return shares.Mount(shares.System(), all), nil
}

// openPort opens the link's port, and notes whether a host is connected.
func (a *agent) openPort(ctx context.Context) (io.ReadWriteCloser, error) {
	port, err := link.OpenPort(ctx)
	if err != nil {
		return nil, err
	}
	return watchedPort{port, &a.away}, nil
}

// watchedPort is a port that notes whether a host is connected: reads of a port
// whose host is away end at once.
type watchedPort struct {
	io.ReadWriteCloser
	away *atomic.Bool
}

// Read implements io.Reader.
func (p watchedPort) Read(b []byte) (int, error) {
	n, err := p.ReadWriteCloser.Read(b)
	p.away.Store(n == 0 && err == io.EOF)
	return n, err
}
