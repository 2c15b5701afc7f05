package rpc

import (
	"context"

	"connectrpc.com/connect"

	guestv1 "github.com/hutch-run/hutch/gen/hutch/guest/v1"
	"github.com/hutch-run/hutch/internal/guest/clock"
	"github.com/hutch-run/hutch/internal/guest/identity"
)

// guestService serves hutch.guest.v1.GuestService.
type guestService struct{ p Params }

// Configure makes the guest a sandbox.
func (s *guestService) Configure(ctx context.Context, r *connect.Request[guestv1.ConfigureRequest],
) (*connect.Response[guestv1.ConfigureResponse], error) {
	facts, err := s.p.Identity.Configure(ctx, config(r.Msg))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&guestv1.ConfigureResponse{
		AgentVersion: s.p.Version, KernelVersion: facts.Kernel, BootId: facts.BootID, Warnings: facts.Warnings,
	}), nil
}

func config(m *guestv1.ConfigureRequest) identity.Config {
	n := m.GetNetwork()
	return identity.Config{
		ID: m.GetSandboxId(), MachineID: m.GetMachineId(),
		Network: identity.Network{Address: n.GetAddress(), Gateway: n.GetGateway(), DNS: n.GetDns(), MTU: n.GetMtu()},
		Host:    clock.FromNanos(m.GetUnixNanos()),
		Entropy: m.GetEntropy(), Env: m.GetEnv(), User: m.GetDefaultUser(), Cwd: m.GetDefaultCwd(),
	}
}
