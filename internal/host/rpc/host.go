package rpc

import (
	"context"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
)

// host serves hostagent.v1.HostService.
type host struct {
	host  Host
	boxes lifecycle.Sandboxes
}

// GetHostInfo implements the RPC.
func (h *host) GetHostInfo(ctx context.Context, _ *connect.Request[hostagentv1.GetHostInfoRequest]) (*connect.Response[hostagentv1.GetHostInfoResponse], error) {
	i, err := h.host.Info(ctx)
	return answer(&hostagentv1.GetHostInfoResponse{
		Version: i.Version, Kernel: i.Kernel, Arch: i.Arch,
		Vmm: i.VMM, VmmVersion: i.VMMVersion, Accel: i.Accel, AccelReason: i.AccelReason,
		KernelId: i.KernelID, Cpus: int32(i.CPUs),
		MemoryBytes: i.MemoryBytes, MemoryAvailableBytes: i.MemoryAvailable, DiskAvailableBytes: i.DiskAvailable,
		Sandboxes: int32(len(h.boxes.List())), SlotsUsed: int32(i.SlotsUsed), SlotsTotal: int32(i.SlotsTotal),
		Root: i.Root, StartedAtUnix: unixSeconds(i.StartedAt),
	}, err)
}

// Diagnose implements the RPC.
func (h *host) Diagnose(ctx context.Context, _ *connect.Request[hostagentv1.DiagnoseRequest]) (*connect.Response[hostagentv1.DiagnoseResponse], error) {
	checks, err := h.host.Diagnose(ctx)
	res := &hostagentv1.DiagnoseResponse{}
	for _, c := range checks {
		res.Checks = append(res.Checks, &hostagentv1.Check{Name: c.Name, Result: c.Result, Detail: c.Detail, Advice: c.Advice})
	}
	return answer(res, err)
}
