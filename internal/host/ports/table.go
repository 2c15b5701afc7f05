package ports

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/host/relay"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Bounds of one sandbox.
const (
	MaxBindings = 1024
	// MaxConns is how many TCP connections are carried at once, MaxFlows how
	// many clients of UDP. Together they leave room on the link for other uses.
	MaxConns = 256
	MaxFlows = 128
)

const (
	// retryEvery is how often ports are tried again that somebody else has.
	retryEvery = 15 * time.Second
	// flowIdle is how long a flow of UDP lives without a datagram.
	flowIdle = 120 * time.Second
	// settleTime is how long a sandbox runs before its guest is asked, whose
	// caller's first program may run now.
	settleTime = time.Second
)

// Params is what a Table needs.
type Params struct {
	Sandboxes Sandboxes
	Policy    Policy
	// File is where the table keeps what it must know again after a restart: a
	// path in the sandbox's own directory.
	File func(id sandbox.ID) string
	// MaxListeners bounds the open listeners of all sandboxes. 0: 8192.
	MaxListeners int
	Log          *slog.Logger

	// Tests only; zero: as above.
	retryEvery, flowIdle, settle time.Duration
}

// Table is all that is published and opened. It is safe for concurrent use.
type Table struct {
	p       Params
	buffers relay.Buffers
	life    context.Context
	end     context.CancelFunc
	wg      sync.WaitGroup // every goroutine; Add is guarded by mu, or by a goroutine of it

	mu      sync.Mutex // guards what follows, and boxes, owners and bindings
	closed  bool
	boxes   map[sandbox.ID]*box
	held    map[key]*listener
	waiting map[*binding]struct{} // not open, or not by themselves
	order   uint64                // of bindings: who asked first
	timer   *time.Timer           // the next retry; nil: none
}

// New returns an empty table.
func New(p Params) (*Table, error) {
	if p.Sandboxes == nil || p.File == nil || p.Log == nil || !p.Policy.Bind.valid() {
		return nil, fmt.Errorf("ports: Params lacks Sandboxes, File or Log, or bind %q is none of %q", p.Policy.Bind, Binds())
	}
	orElse(&p.MaxListeners, 8192)
	orElse(&p.retryEvery, retryEvery)
	orElse(&p.flowIdle, flowIdle)
	orElse(&p.settle, settleTime)
	life, end := context.WithCancel(context.Background())
	return &Table{
		p: p, life: life, end: end,
		boxes: map[sandbox.ID]*box{}, held: map[key]*listener{}, waiting: map[*binding]struct{}{},
	}, nil
}

func orElse[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Close closes every listener, ends every connection, and waits for all
// goroutines. What is published is kept for the next table.
func (t *Table) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	t.end()
	if t.timer != nil {
		t.timer.Stop()
	}
	boxes := slices.Collect(maps.Values(t.boxes))
	for _, l := range t.held {
		l.close()
	}
	for _, b := range boxes {
		b.stopTimersLocked()
	}
	t.mu.Unlock()
	t.wg.Wait()
	var errs []error
	for _, b := range boxes {
		errs = append(errs, b.save())
	}
	return errors.Join(errs...)
}

// State tells the table what state a sandbox is in. Repetition does no harm.
func (t *Table) State(id sandbox.ID, s sandbox.State) {
	if t.p.Policy.Bind == None {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	b := t.boxes[id]
	switch s {
	case sandbox.Running:
		if b == nil {
			b = t.addLocked(id)
		}
		b.wake()
	case sandbox.Paused, sandbox.Hibernated:
		if b == nil {
			t.addLocked(id)
		}
	case sandbox.Pending:
	case sandbox.Stopped, sandbox.Failed, sandbox.Broken:
		if b != nil {
			b.clearLocked()
		}
	case sandbox.Destroying, sandbox.Gone:
		if b != nil {
			t.dropLocked(b)
		}
	}
}

// Only tells the table of all sandboxes that there are.
func (t *Table) Only(ids map[sandbox.ID]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, b := range t.boxes {
		if !ids[id] {
			t.dropLocked(b)
		}
	}
}

// Poke has the guest of a running sandbox asked now: a daemon was started in
// there.
func (t *Table) Poke(id sandbox.ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if b := t.boxes[id]; b != nil {
		b.hurry()
	}
}

// List returns all bindings, or those of one sandbox, by sandbox, owner,
// protocol, address and port.
func (t *Table) List(id sandbox.ID) []Published {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Published
	for _, b := range t.boxes {
		if id != "" && b.id != id {
			continue
		}
		for _, o := range b.owners {
			for _, bd := range o.bindings {
				out = append(out, bd.publishedLocked())
			}
		}
	}
	slices.SortFunc(out, comparePublished)
	return out
}

// addLocked makes the box of a sandbox, with what the table before kept of it.
// t.mu is held.
func (t *Table) addLocked(id sandbox.ID) *box {
	b := newBox(t, id)
	t.boxes[id] = b
	b.loadLocked()
	t.wg.Go(b.run)
	return b
}

// dropLocked forgets a sandbox. t.mu is held.
func (t *Table) dropLocked(b *box) {
	delete(t.boxes, b.id)
	b.over = true
	b.stopTimersLocked()
	b.clearLocked()
	b.end()
}
