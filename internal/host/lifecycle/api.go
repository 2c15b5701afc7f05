package lifecycle

import (
	"context"
	"time"

	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// View is what readers see of a sandbox: its record, as of the last change,
// and what is in flight.
type View struct {
	sandbox.Record
	InFlight int
	Pid      int // of the VMM, 0: none
}

// Forked is what came of a fork.
type Forked struct {
	Views   []View
	Stopped time.Duration // how long the source stood still
}

// SnapshotView is what readers see of a snapshot.
type SnapshotView struct {
	snapshot.Manifest
	// Users are the sandboxes that were made from it; of a hibernation the one
	// that sleeps.
	Users []sandbox.ID
	InRAM bool
	// Problem tells why this host can't start it now; empty: it can.
	Problem string
}

// Sandboxes is what the API handlers need of the Manager.
type Sandboxes interface {
	// Create makes a sandbox, or returns the one that the same request made
	// before. id may be empty. The work goes on to its end when ctx is done.
	Create(ctx context.Context, id sandbox.ID, spec sandbox.Spec) (View, error)
	// Destroy ends a sandbox from any state; unknown is fault.NotFound.
	Destroy(ctx context.Context, id sandbox.ID) error
	Pause(ctx context.Context, id sandbox.ID) error
	Resume(ctx context.Context, id sandbox.ID) error
	// Hibernate writes a sandbox's memory to disk and ends its VM. A Resume that
	// comes meanwhile ends it; it is fault.Canceled then. A Use ends only one that
	// its timeout began.
	Hibernate(ctx context.Context, id sandbox.ID) error
	// Use holds a sandbox active and gives access to its guest until the
	// returned done is called. One that sleeps is resumed first if its spec says
	// AutoResume: once for all who ask meanwhile, and to its end when ctx is
	// done; the error of that is everybody's.
	Use(ctx context.Context, id sandbox.ID) (g guestconn.Guest, done func(), err error)
	// KeepAlive counts as activity. It resumes nothing.
	KeepAlive(ctx context.Context, id sandbox.ID) error
	// List returns all sandboxes, oldest first.
	List() []View
	// Get returns one sandbox by its id or by a prefix that names only one.
	Get(idOrPrefix string) (View, error)
	// Wait returns when the sandbox is in one of states, or gone (then the
	// view's State is sandbox.Gone).
	Wait(ctx context.Context, id sandbox.ID, states ...sandbox.State) (View, error)
}
