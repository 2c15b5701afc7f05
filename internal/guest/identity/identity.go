package identity

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"

	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/guest/shares"
)

// Config is who and where the guest is. Empty fields leave what they are
// about alone, unless they say otherwise.
type Config struct {
	// ID becomes the hostname.
	ID string
	// MachineID is 32 lower-case hex digits.
	MachineID string
	Network   Network
	// Host is the host's time at sending.
	Host clock.HostTime
	// Entropy is random bytes for the kernel's generator, at least 32.
	// Configure overwrites them: memory that is copied later must not tell what
	// the generator was given.
	Entropy []byte
	// BootID is a lower-case UUID that this boot is known by from now on. Each
	// copy of a running guest is given one of its own.
	BootID string
	// Still: no program runs until Configure has returned, so none sees the
	// clock jump.
	Still bool
	// Env, User and Cwd replace the defaults, also when empty.
	Env  map[string]string
	User string
	Cwd  string
	// TestFeatures turns on what only tests need.
	TestFeatures bool
	// Shares are what the agent mounts besides.
	Shares []shares.Share
}

// Network is the guest's place in the network.
type Network struct {
	// Address with prefix length. Empty: eth0 loses its addresses.
	Address string
	Gateway string
	DNS     []string
	MTU     uint32 // bytes; 0: as it is
}

// Facts is what a configured guest tells of itself.
type Facts struct {
	Kernel string // release
	BootID string
	// Renamed: the boot id was another one before.
	Renamed bool
	// Warnings are what went wrong without stopping the configuration.
	Warnings []string
	// ShareErrors are why shares are not mounted.
	ShareErrors []string
}

// Kernel is what this package asks of the kernel.
type Kernel interface {
	// Release returns the kernel release.
	Release() (string, error)
	Hostname() (string, error)
	SetHostname(name string) error
	// AddEntropy mixes seed into the random generator, counts it as random,
	// and makes the generator use it from now on.
	AddEntropy(seed []byte) error
	// SetBootID makes programs read id as the boot id. Repeating it changes
	// nothing.
	SetBootID(id string) error
}

// Links is the network as this package uses it. Both methods bring about a
// state, whatever was before; repeating them changes nothing.
type Links interface {
	// Loopback brings the loopback interface up.
	Loopback() error
	// Apply gives the interface exactly one address of the family (none when
	// p.Address is not valid), and the default route by the gateway when there
	// is one.
	Apply(p LinkParams) error
}

// Clock takes the host's time.
type Clock interface {
	Sync(host clock.HostTime) (clock.Result, error)
	// Force is Sync while no program can see the clock jump.
	Force(host clock.HostTime) (clock.Result, error)
}

// Params are what an Identity is made of.
type Params struct {
	// Root is the directory that stands for "/". Empty: "/".
	Root   string
	Kernel Kernel
	Links  Links
	Clock  Clock
	Log    *slog.Logger
}

// Identity is who this guest is. Safe for concurrent use. It is an
// account.Defaults.
type Identity struct {
	p         Params
	configure sync.Mutex // one Configure at a time

	mu   sync.RWMutex      // guards what follows
	env  map[string]string // replaced, never changed
	user string
	cwd  string
	test bool

	bootID string          // guarded by configure; empty: nobody has asked yet
	made   map[string]made // files in /etc by their names; guarded by configure
}

// New returns the Identity of a guest that nobody has configured yet.
func New(p Params) *Identity {
	if p.Root == "" {
		p.Root = "/"
	}
	return &Identity{p: p, made: map[string]made{}}
}

// Configure makes the guest what c says. Invalid configurations are refused
// whole. On another error some of it may be done; repeating the call is safe.
func (i *Identity) Configure(ctx context.Context, c Config) (Facts, error) {
	plan, err := check(c)
	if err != nil {
		return Facts{}, err
	}
	i.configure.Lock()
	defer i.configure.Unlock()
	if err := ctx.Err(); err != nil {
		return Facts{}, fmt.Errorf("configure guest: %w", err)
	}
	var facts Facts
	warn := func(err error) {
		if err != nil {
			facts.Warnings = append(facts.Warnings, err.Error())
		}
	}
	// Randomness first: until then, all clones of a snapshot draw the same.
	if len(c.Entropy) > 0 {
		err := i.p.Kernel.AddEntropy(c.Entropy)
		clear(c.Entropy)
		if err != nil {
			return Facts{}, fmt.Errorf("reseed random generator: %w", err)
		}
	}
	warn(i.setClock(c))
	if err := i.setHostname(c.ID); err != nil {
		return Facts{}, err
	}
	if err := i.setNetwork(plan); err != nil {
		return Facts{}, err
	}
	i.writeFiles(c, plan, warn)
	i.setDefaults(c)
	if facts.Kernel, err = i.p.Kernel.Release(); err != nil {
		return Facts{}, fmt.Errorf("read kernel release: %w", err)
	}
	i.nameBoot(c, &facts, warn)
	i.p.Log.Info("configured", "id", c.ID, "address", c.Network.Address, "warnings", facts.Warnings)
	return facts, nil
}

func (i *Identity) setClock(c Config) error {
	set := i.p.Clock.Sync
	if c.Still {
		set = i.p.Clock.Force
	}
	_, err := set(c.Host)
	return err
}

// Prepare does before a guest is copied what each of its copies would have to
// do: it lets programs read the boot id in a place where it can be another one.
func (i *Identity) Prepare() error {
	i.configure.Lock()
	defer i.configure.Unlock()
	if err := i.findBootID(); err != nil {
		return err
	}
	return i.p.Kernel.SetBootID(i.bootID)
}

func (i *Identity) findBootID() (err error) {
	if i.bootID == "" {
		i.bootID, err = readBootID(i.p.Root)
	}
	return err
}

// nameBoot finds out how this boot is called, and calls it otherwise if asked
// to. That programs can't be shown the new name is a warning: the host knows it.
func (i *Identity) nameBoot(c Config, facts *Facts, warn func(error)) {
	warn(i.findBootID())
	facts.BootID = i.bootID
	if c.BootID == "" || c.BootID == i.bootID {
		return
	}
	warn(i.p.Kernel.SetBootID(c.BootID))
	i.bootID, facts.BootID, facts.Renamed = c.BootID, c.BootID, true
}

func (i *Identity) setHostname(name string) error {
	if name == "" {
		return nil
	}
	if now, err := i.p.Kernel.Hostname(); err == nil && now == name {
		return nil
	}
	if err := i.p.Kernel.SetHostname(name); err != nil {
		return fmt.Errorf("set hostname %s: %w", name, err)
	}
	return nil
}

func (i *Identity) setNetwork(p plan) error {
	if err := i.p.Links.Loopback(); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	if err := i.p.Links.Apply(p.link); err != nil {
		return fmt.Errorf("configure %s: %w", p.link.Name, err)
	}
	return nil
}

func (i *Identity) setDefaults(c Config) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.env, i.user, i.cwd, i.test = maps.Clone(c.Env), c.User, c.Cwd, c.TestFeatures
}

// Env returns the environment of every command. Callers don't change the map.
func (i *Identity) Env() map[string]string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.env
}

// User returns the user of calls that name none. Empty: root.
func (i *Identity) User() string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.user
}

// Cwd returns the working directory of calls that name none. Empty: the
// user's home.
func (i *Identity) Cwd() string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.cwd
}

// TestFeatures reports whether what only tests need is on.
func (i *Identity) TestFeatures() bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.test
}
