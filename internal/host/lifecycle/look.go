package lifecycle

import (
	"context"

	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// look returns the guest of a running sandbox. To look is no activity, and
// resumes nothing.
func (m *Manager) look(ctx context.Context, id sandbox.ID) (g guestconn.Guest, err error) {
	b, err := m.find(id)
	if err != nil {
		return nil, err
	}
	err = b.ask(ctx, sandbox.Use, true, func() error {
		g = b.guest
		return nil
	})
	return g, err
}

// Memory tells how much memory the guest of a running sandbox uses and has, in
// bytes. Looking is no activity.
func (m *Manager) Memory(ctx context.Context, id sandbox.ID) (used, total uint64, err error) {
	g, err := m.look(ctx, id)
	if err != nil {
		return 0, 0, err
	}
	return g.Memory(ctx)
}

// WatchPorts has the guest of a running sandbox tell each which of its ports
// are published, until ctx ends or the guest is lost. Looking is no activity.
func (m *Manager) WatchPorts(ctx context.Context, id sandbox.ID, each func(guestconn.PortEvent) error) error {
	g, err := m.look(ctx, id)
	if err != nil {
		return err
	}
	return g.WatchPorts(ctx, each)
}
