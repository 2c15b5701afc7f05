package daemon

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/events"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/ports"
	"github.com/hutch-run/hutch/internal/sandbox"
)

func (p *parts) openPorts(context.Context) error {
	var err error
	p.ports, err = ports.New(ports.Params{
		Sandboxes: portSandboxes{p},
		Policy:    ports.Policy{Bind: ports.Bind(p.cfg.Ports.Bind), Privileged: p.cfg.Ports.Privileged},
		File:      p.store.Ports, MaxListeners: maxListeners(), Log: p.log,
	})
	return err
}

// maxListeners leaves half of hutchd's descriptors for everything else.
func maxListeners() int {
	const most = 8192
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return most
	}
	return int(min(most, l.Cur/2))
}

// portSandboxes is the sandboxes as package ports sees them.
type portSandboxes struct{ p *parts }

// Use implements ports.Sandboxes.
func (s portSandboxes) Use(ctx context.Context, id sandbox.ID) (ports.Guest, func(), error) {
	return s.p.sandboxes.Use(ctx, id)
}

// Watch implements ports.Sandboxes.
func (s portSandboxes) Watch(ctx context.Context, id sandbox.ID, each func(ports.Event) error) error {
	return s.p.sandboxes.WatchPorts(ctx, id, func(e guestconn.PortEvent) error {
		out := ports.Event{Kind: portKind(e.Kind), Owner: ports.Owner{ID: e.Owner, Name: e.Name}}
		for _, b := range e.Bindings {
			out.Owner.Bindings = append(out.Owner.Bindings, ports.Binding(b))
		}
		return each(out)
	})
}

func portKind(k guestconn.PortEventKind) ports.Kind {
	switch k {
	case guestconn.PortsChanged:
		return ports.Changed
	case guestconn.PortsRemoved:
		return ports.Removed
	case guestconn.PortsSynced:
		return ports.Synced
	}
	return 0
}

// followStates keeps the table of ports told of the sandboxes' states. The
// returned stop ends that and closes the table.
func (p *parts) followStates() (stop func() error, err error) {
	r, err := p.events.Subscribe(-1)
	if err != nil {
		return nil, err
	}
	p.tellStates()
	ctx, cancel := context.WithCancel(context.Background())
	var following sync.WaitGroup
	following.Go(func() {
		for {
			b, err := r.Next(ctx)
			if err != nil {
				if ctx.Err() == nil {
					p.log.Error("published ports are not kept up to date any more", "error", err)
				}
				return
			}
			p.tellBatch(b)
		}
	})
	return func() error {
		cancel()
		following.Wait()
		return p.ports.Close()
	}, nil
}

func (p *parts) tellBatch(b events.Batch) {
	if b.Missed > 0 {
		p.tellStates()
	}
	for _, e := range b.Events {
		p.ports.State(e.ID, e.State)
	}
}

// tellStates tells what all sandboxes are now.
func (p *parts) tellStates() {
	there := map[sandbox.ID]bool{}
	for _, v := range p.sandboxes.List() {
		there[v.ID] = true
	}
	p.ports.Only(there)
	for _, v := range p.sandboxes.List() {
		p.ports.State(v.ID, v.State)
	}
}
