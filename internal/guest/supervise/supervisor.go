package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// Params is what a Supervisor is made of. All but Gate are needed.
type Params struct {
	// Cgroups is the directory on a cgroup2 filesystem below which every unit
	// gets its own.
	Cgroups string
	// Dir is on a tmpfs, and of root alone: notes and FIFOs are there.
	Dir string
	// Gate says when programs may start. Nil: at any time.
	Gate Gate
	Log  *slog.Logger

	pace pace // tests only; zero: the constants
}

// Gate holds starts up.
type Gate interface {
	// Enter waits until a program may start. A nil error is followed by Leave
	// when it has, or has failed to.
	Enter(ctx context.Context) error
	Leave()
}

type openGate struct{}

func (openGate) Enter(context.Context) error { return nil }
func (openGate) Leave()                      {}

// Supervisor keeps units running. All methods are safe for concurrent use.
type Supervisor struct {
	p Params

	ctx     context.Context // of all goroutines
	cancel  context.CancelFunc
	working sync.WaitGroup

	mu     sync.Mutex
	units  []*unit // in the order of their definition
	ending bool    // nothing is started any more
}

// New returns a Supervisor without units. It touches nothing yet. Close it.
func New(p Params) *Supervisor {
	if p.Gate == nil {
		p.Gate = openGate{}
	}
	p.pace.setDefaults()
	s := &Supervisor{p: p}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Define makes a unit known. If an earlier server of this boot left it wanted,
// it is wanted again: its program is taken over where it still runs. A unit
// that is defined already is replaced, unless somebody wants it.
func (s *Supervisor) Define(def Unit) error {
	if err := def.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		return errEnding
	}
	for _, need := range def.Needs {
		if s.find(need) == nil {
			return fmt.Errorf("define unit %s, which needs %s: %w", def.Name, need, errNoUnit)
		}
	}
	u := s.find(def.Name)
	if u == nil {
		u = newUnit(s, def)
		s.units = append(s.units, u)
	} else if err := u.redefine(def); err != nil {
		return err
	}
	found, err := readNote(s.notePath(def.Name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		s.p.Log.Warn("read what the server before left", "unit", def.Name, "error", err)
		return nil
	}
	u.resume(found)
	return nil
}

// Left reports whether an earlier server of this boot left the unit wanted, so
// that it should be defined at once.
func (s *Supervisor) Left(name string) bool {
	_, err := os.Stat(s.notePath(name))
	return err == nil
}

// Names returns the units in the order of their definition.
func (s *Supervisor) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.units))
	for _, u := range s.units {
		names = append(names, u.def.Name)
	}
	return names
}

// Start asks for a unit and all that it needs, and returns at once. For a unit
// that is wanted already it changes nothing.
func (s *Supervisor) Start(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		return errEnding
	}
	u := s.find(name)
	if u == nil {
		return fmt.Errorf("start %s: %w", name, errNoUnit)
	}
	for _, n := range s.below(u) {
		if err := n.want(); err != nil {
			return err
		}
	}
	return u.want()
}

// Stop stops a unit, and before it those that need it, and returns when it has
// ended. Each gets limit: 0 means its own StopTimeout, less is none at all. To
// stop a unit that is being stopped can only shorten its time. When ctx ends
// first, the stop goes on.
func (s *Supervisor) Stop(ctx context.Context, name string, limit time.Duration) error {
	s.mu.Lock()
	u := s.find(name)
	if u == nil {
		s.mu.Unlock()
		return fmt.Errorf("stop %s: %w", name, errNoUnit)
	}
	order := append(s.above(u), u)
	s.mu.Unlock()
	for _, u := range order {
		if err := u.stop(ctx, limitOf(u.def, limit)); err != nil {
			return err
		}
	}
	return nil
}

func limitOf(def Unit, limit time.Duration) time.Duration {
	if limit == 0 {
		return def.StopTimeout
	}
	return max(limit, 0)
}

// Status returns what a unit does, and a channel that is closed when that
// changes. It never waits. A unit that nobody defined is Stopped.
func (s *Supervisor) Status(name string) (Status, <-chan struct{}) {
	s.mu.Lock()
	u := s.find(name)
	s.mu.Unlock()
	if u == nil {
		return Status{Name: name, State: Stopped}, nil
	}
	return u.look()
}

// Await returns when a unit is Ready, Failed or Stopped.
func (s *Supervisor) Await(ctx context.Context, name string) (Status, error) {
	for {
		st, changed := s.Status(name)
		switch st.State {
		case Ready, Failed, Stopped:
			return st, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return st, fmt.Errorf("wait for %s: %w", name, context.Cause(ctx))
		}
	}
}

// Close ends the supervision and leaves the programs as they are. The
// Supervisor can't be used afterwards.
func (s *Supervisor) Close() {
	s.mu.Lock()
	s.ending = true
	units := slices.Clone(s.units)
	s.mu.Unlock()
	s.cancel()
	for _, u := range units {
		u.close()
	}
	s.working.Wait()
}

// errEnding is for those who come too late.
var errEnding = fault.New(fault.Unavailable, "the guest is shutting down: services are not started any more")

// find is called with the lock held.
func (s *Supervisor) find(name string) *unit {
	for _, u := range s.units {
		if u.def.Name == name {
			return u
		}
	}
	return nil
}

// below returns what u needs, directly or not, what is needed first.
func (s *Supervisor) below(u *unit) []*unit {
	var list []*unit
	for _, name := range u.def.Needs {
		n := s.find(name)
		for _, m := range append(s.below(n), n) {
			if !slices.Contains(list, m) {
				list = append(list, m)
			}
		}
	}
	return list
}

// above returns what needs u, directly or not, in the order of a stop. What was
// defined later is stopped first: a definition comes after those of its needs.
func (s *Supervisor) above(u *unit) []*unit {
	var list []*unit
	for _, other := range slices.Backward(s.units) {
		if slices.Contains(s.below(other), u) {
			list = append(list, other)
		}
	}
	return list
}
