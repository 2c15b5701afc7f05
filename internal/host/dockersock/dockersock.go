package dockersock

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/relay"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// startLimit bounds how long requests wait for a guest's Docker to come up.
const startLimit = 5 * time.Minute

// Sandboxes is what the sockets need of the sandboxes.
type Sandboxes interface {
	List() []lifecycle.View
	// Get returns a sandbox by its id or a prefix that names only one.
	Get(idOrPrefix string) (lifecycle.View, error)
	// Use holds a sandbox active, and gives its guest, until done is called.
	Use(ctx context.Context, id sandbox.ID) (g guestconn.Guest, done func(), err error)
}

// Binding is one port that a container is to publish.
type Binding struct {
	Protocol      string // "tcp" or "udp"
	HostIP        string // empty: every address
	HostPort      uint16
	ContainerPort uint16
}

// Wish is a port of the host whose number is left open.
type Wish struct {
	Protocol      string // "tcp" or "udp"
	HostIP        string // empty: every address
	First, Last   uint16 // the numbers that will do; 0: any
	ContainerPort uint16
}

// Ports reserves ports of the host.
type Ports interface {
	// Choose picks and reserves a number for each of the wishes of a container
	// that is about to be made, or none; 0 is left to the guest. None that is
	// free is fault.Exists. release gives back what no Reserve of these numbers
	// has taken by then.
	Choose(ctx context.Context, id sandbox.ID, name string, wishes []Wish) (numbers []uint16, release func(), err error)
	// Reserve takes all ports that a container of sandbox id is to publish, or
	// none. owner is the container's id, name is for people. A port that another
	// has is fault.Exists, in the words of a failed net.Listen. release gives
	// back what the guest has not said by then to be published.
	Reserve(ctx context.Context, id sandbox.ID, owner, name string, bindings []Binding) (release func(), err error)
}

// Params is what New needs.
type Params struct {
	Sandboxes Sandboxes
	// Subscribe opens the event log at a cursor.
	Subscribe func(after int64) (*events.Reader, error)
	// Dir holds a directory for each sandbox.
	Dir string
	// Ports may be nil: then no port is reserved.
	Ports Ports
	Log   *slog.Logger

	startLimit time.Duration // tests only; 0: startLimit
}

// Sockets is the Docker sockets of a host's sandboxes. It is safe for
// concurrent use.
type Sockets struct {
	p       Params
	buffers relay.Buffers
	running sync.WaitGroup

	// open ends when Close is called.
	open context.Context
	stop context.CancelFunc

	mu    sync.Mutex
	doors map[sandbox.ID]*door // guarded by mu
}

// New returns Sockets without any.
func New(p Params) (*Sockets, error) {
	if p.Sandboxes == nil || p.Subscribe == nil || p.Dir == "" || p.Log == nil {
		return nil, errors.New("dockersock: a needed field of Params is not set")
	}
	if p.startLimit == 0 {
		p.startLimit = startLimit
	}
	s := &Sockets{p: p, doors: map[sandbox.ID]*door{}}
	s.open, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Start opens the sockets of the sandboxes that are there, and follows what
// becomes of them until Close.
func (s *Sockets) Start() error {
	r, err := s.p.Subscribe(-1)
	if err != nil {
		return err
	}
	s.syncAll()
	s.running.Go(func() { s.follow(r) })
	return nil
}

// Close removes all sockets, ends what is in flight, and waits for it.
func (s *Sockets) Close() error {
	s.stop()
	s.running.Wait()
	s.mu.Lock()
	doors := s.doors
	s.doors = nil
	s.mu.Unlock()
	for _, d := range doors {
		d.close()
	}
	return nil
}

// Path returns where the socket of a sandbox is, which is open then, also before
// its event was read. It is empty when the sandbox has none.
func (s *Sockets) Path(id sandbox.ID) string {
	if d := s.doorOf(id); d != nil && d.listening() {
		return s.path(id)
	}
	return ""
}

// Serve serves one connection as if it had come to the socket of sandbox id,
// to its end.
func (s *Sockets) Serve(id sandbox.ID, conn net.Conn) error {
	d := s.doorOf(id)
	if d == nil {
		return errors.Join(fault.New(fault.Precondition, "sandbox %s has no Docker socket: it has not run yet, or is gone", id), conn.Close())
	}
	d.serve(conn)
	return nil
}

// doorOf returns the door of a sandbox that is to have one, also before its
// event was read.
func (s *Sockets) doorOf(id sandbox.ID) *door {
	if d := s.door(id); d != nil {
		return d
	}
	s.sync(id)
	return s.door(id)
}

func (s *Sockets) door(id sandbox.ID) *door {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.doors[id]
}

func (s *Sockets) path(id sandbox.ID) string {
	return filepath.Join(s.p.Dir, string(id), lifecycle.DockerSocket)
}
