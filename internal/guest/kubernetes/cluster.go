package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// UnitName is the name of the unit, and of its log.
const UnitName = "kubernetes"

// Endpoint is where the API is, as seen in the guest.
const Endpoint = "https://127.0.0.1:6443"

// What a distribution gets where it names no time.
const (
	defaultStopTimeout  = 20 * time.Second
	defaultResetTimeout = 30 * time.Second
)

// oomScoreAdj has the kernel take pods, when memory runs out, before the cluster.
const oomScoreAdj = -500

// lookPatience is how long a status waits to be of now.
const lookPatience = 600 * time.Millisecond

// Supervisor runs units; a *supervise.Supervisor.
type Supervisor interface {
	Define(u supervise.Unit) error
	Left(name string) bool
	Start(name string) error
	Stop(ctx context.Context, name string, limit time.Duration) error
	Status(name string) (supervise.Status, <-chan struct{})
}

// Params is what a Cluster is made of. All but Root and Asked are needed.
type Params struct {
	// Root is the directory that stands for "/" when a distribution is looked
	// for. Empty: "/".
	Root  string
	Units Supervisor
	// Needs defines a unit that a distribution needs. It is called again and
	// again.
	Needs func(name string) error
	// Asked is called once, when somebody asks for a cluster, with its locks
	// held. May be nil.
	Asked func()
	// Machine is what the cluster stands on.
	Machine Machine
	// Mark is the path of a file on a tmpfs that says that a cluster may have
	// left something in this machine.
	Mark string
	Log  *slog.Logger
}

// Machine is what a start prepares, and what a stop cleans.
type Machine interface {
	// Prepare makes the machine fit for d. What it could not do but may not be
	// missed is told in the warnings.
	Prepare(ctx context.Context, d Distribution) (warnings []string, err error)
	// Leftovers lists what of l there is.
	Leftovers(l Leftovers) ([]Leftover, error)
	// Reset runs the distribution's own clean-up.
	Reset(ctx context.Context, r Reset, env []string) error
	// Restore undoes Prepare, as far as that is seen from outside.
	Restore() error
}

// Cluster is the cluster of this guest. It does nothing until it is asked to.
// Safe for concurrent use.
type Cluster struct {
	p      Params
	ctx    context.Context // of all goroutines
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu      sync.Mutex
	defined *Distribution // of the unit; nil: there is none yet
	life    *life         // of the program, the last that was looked at
	turn    *turn         // a stop or delete that goes on
	warned  []string      // by the last Prepare
	asked   chan struct{} // closed once somebody asked for a cluster
}

// New returns the cluster of a guest. Close it.
func New(p Params) *Cluster {
	if p.Root == "" {
		p.Root = "/"
	}
	c := &Cluster{p: p, asked: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Close ends all that this package does. What runs, goes on.
func (c *Cluster) Close() {
	c.cancel()
	c.all.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forget()
}

// Recover takes up what an earlier server of this boot had started.
func (c *Cluster) Recover() error {
	if !c.p.Units.Left(UnitName) {
		return nil
	}
	_, err := c.define()
	return err
}

// Define makes the unit of the distribution known to the supervisor. Every call
// that needs it does so; it is for those who want its log.
func (c *Cluster) Define() error {
	_, err := c.define()
	return err
}

// define returns the distribution, and makes its unit known. While the unit
// runs, it stays what it was.
func (c *Cluster) define() (Distribution, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.defined != nil {
		if st, _ := c.p.Units.Status(UnitName); st.State != supervise.Stopped {
			return *c.defined, nil
		}
	}
	d, err := Find(c.p.Root)
	if err != nil {
		return d, err
	}
	for _, need := range d.Needs {
		if err := c.p.Needs(need); err != nil {
			return d, err
		}
	}
	if err := c.p.Units.Define(c.unit(d)); err != nil {
		return d, fmt.Errorf("define %s: %w", d.Name, err)
	}
	if c.defined == nil {
		close(c.asked)
		if c.p.Asked != nil {
			c.p.Asked()
		}
	}
	c.defined = &d
	return d, nil
}

func (c *Cluster) unit(d Distribution) supervise.Unit {
	signal, _ := d.Stop.signal()
	return supervise.Unit{
		Name: UnitName, Argv: d.Command, Env: d.Env, Needs: d.Needs, OOMScoreAdj: oomScoreAdj,
		StopSignal: signal, StopTimeout: seconds(d.Stop.Timeout, defaultStopTimeout), KillRest: true,
		Prepare: func(ctx context.Context) error { return c.prepare(ctx, d) },
		Ready: func(ctx context.Context) (string, error) {
			api, err := c.current(d).connect()
			if err == nil {
				err = api.call(ctx, d.API.Readyz, nil)
			}
			if err != nil {
				return "", fmt.Errorf("waiting for the API: %s", shorten(err.Error()))
			}
			return "the API is ready", nil
		},
	}
}

func (c *Cluster) prepare(ctx context.Context, d Distribution) error {
	if err := writeMark(c.p.Mark); err != nil {
		return err
	}
	warnings, err := c.p.Machine.Prepare(ctx, d)
	for _, w := range warnings {
		c.p.Log.Warn("prepare for Kubernetes", "problem", w)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.warned = warnings
	return err
}

// Start asks for the cluster, and says at once how far it is.
func (c *Cluster) Start(context.Context) (Status, error) {
	c.mu.Lock()
	ending := c.turn
	c.mu.Unlock()
	if ending != nil {
		return Status{}, fault.New(fault.Unavailable, "Kubernetes is being %s: start it again when that is over", ending.kind)
	}
	if _, err := c.define(); err != nil {
		return Status{}, err
	}
	if err := c.p.Units.Start(UnitName); err != nil {
		return Status{}, err
	}
	return c.Status(), nil
}

// Kubeconfig is a file of credentials as it is in the guest.
type Kubeconfig struct {
	YAML     string
	Context  string
	Endpoint string
}

// maxKubeconfig bounds what is read of a kubeconfig.
const maxKubeconfig = 1 << 20

// Kubeconfig returns the administrator's credentials.
func (c *Cluster) Kubeconfig() (Kubeconfig, error) {
	d, err := c.distribution()
	if err != nil {
		return Kubeconfig{}, err
	}
	b, err := readBounded(d.Kubeconfig, maxKubeconfig)
	if errors.Is(err, fs.ErrNotExist) {
		return Kubeconfig{}, fault.New(fault.NotFound, "there is no kubeconfig yet: start Kubernetes first (hutch kube start --wait)")
	}
	if err != nil {
		return Kubeconfig{}, fmt.Errorf("read the kubeconfig: %w", err)
	}
	return Kubeconfig{YAML: string(b), Context: d.Context, Endpoint: d.API.URL}, nil
}

// distribution returns what runs, or would be run by a start.
func (c *Cluster) distribution() (Distribution, error) {
	c.mu.Lock()
	defined := c.defined
	c.mu.Unlock()
	if defined != nil {
		return *defined, nil
	}
	return Find(c.p.Root)
}
