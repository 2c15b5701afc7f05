package daemon

import (
	"context"
	"path/filepath"

	"github.com/hutch-run/hutch/internal/host/dockersock"
	"github.com/hutch-run/hutch/internal/host/ports"
	"github.com/hutch-run/hutch/internal/sandbox"
)

func (p *parts) openDocker(context.Context) error {
	var err error
	p.docker, err = dockersock.New(dockersock.Params{
		Sandboxes: p.sandboxes, Subscribe: p.events.Subscribe, Dir: filepath.Join(p.cfg.RunDir, "sandboxes"),
		Ports: dockerPorts{p.ports}, Log: p.log,
	})
	return err
}

// dockerPorts is the ports of the host as package dockersock sees them.
type dockerPorts struct{ table *ports.Table }

// Reserve implements dockersock.Ports.
func (d dockerPorts) Reserve(ctx context.Context, id sandbox.ID, owner, name string, bindings []dockersock.Binding) (func(), error) {
	list := make([]ports.Binding, len(bindings))
	for i, b := range bindings {
		list[i] = ports.Binding(b)
	}
	return d.table.Reserve(ctx, id, owner, name, list)
}

// Choose implements dockersock.Ports.
func (d dockerPorts) Choose(ctx context.Context, id sandbox.ID, name string, wishes []dockersock.Wish) ([]uint16, func(), error) {
	list := make([]ports.Wish, len(wishes))
	for i, w := range wishes {
		list[i] = ports.Wish(w)
	}
	return d.table.Choose(ctx, id, name, list)
}
