package lifecycle

import (
	"context"

	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Memory tells how much memory the guest of a running sandbox uses and has, in
// bytes. Looking is no activity.
func (m *Manager) Memory(ctx context.Context, id sandbox.ID) (used, total uint64, err error) {
	b, err := m.find(id)
	if err != nil {
		return 0, 0, err
	}
	var g guestconn.Guest
	err = b.ask(ctx, sandbox.Use, true, func() error {
		g = b.guest
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	return g.Memory(ctx)
}
