package share

import (
	"context"
	"fmt"
	"os"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// Host serves directories of a host.
type Host interface {
	// Check refuses what this host does not share, as a fault.Precondition that
	// says what to do.
	Check(shares []sandbox.Share) error
	// Serve starts the server of one share. VMMs are told of it by conn, which
	// is the caller's. On error nothing is left. The server lives on when ctx
	// ends, and when this process does.
	Serve(ctx context.Context, s sandbox.Share, at Place) (server Server, conn *os.File, err error)
	// Adopt takes up a server that an earlier process started. It is a
	// fault.NotFound when that very process is gone, and nothing of it is left.
	Adopt(ctx context.Context, p sandbox.Process, at Place) (Server, error)
}

// Server serves one share. Safe for concurrent use.
type Server interface {
	// ID is what a later Adopt needs.
	ID() sandbox.Process
	// Done is closed when it has ended.
	Done() <-chan struct{}
	// Why tells how it ended, for people, after Done.
	Why() string
	// Kill ends it and frees all that it had. It is idempotent.
	Kill(ctx context.Context) error
	// Close lets go of it without ending it. It is idempotent.
	Close() error
}

// Place is where a share belongs.
type Place struct {
	ID sandbox.ID
	// Index is the share's place in the sandbox's list.
	Index int
	// Dir is an existing directory that only root may write to; in it nothing is
	// left.
	Dir string
	// Log is where the server's words go, capped.
	Log string
	// UID is the user of the sandbox's VMM.
	UID int
}

// Tag is the name by which a guest finds the share at an index.
func Tag(index int) string { return fmt.Sprintf("share%d", index) }

// cell is the name of the share's jail.
func (p Place) cell() string { return string(p.ID) + "_" + Tag(p.Index) }

// Owner returns the sandbox that a jail belongs to, by the jail's name.
func Owner(cell string) sandbox.ID {
	for i, r := range cell {
		if r == '_' {
			return sandbox.ID(cell[:i])
		}
	}
	return sandbox.ID(cell)
}
