package rpc

import (
	"context"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/guestconn"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
)

// hostAgent serves hostagent.v1.HostAgentService.
type hostAgent struct {
	boxes  lifecycle.Sandboxes
	docker Docker // nil: none
	meter  Meter
}

// CreateSandbox implements the RPC.
func (h *hostAgent) CreateSandbox(ctx context.Context, r *connect.Request[hostagentv1.CreateSandboxRequest]) (*connect.Response[hostagentv1.CreateSandboxResponse], error) {
	id, spec, err := specOf(r.Msg)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	view, err := h.boxes.Create(ctx, id, spec)
	h.meter.CreateEnded(err, time.Since(start), view.Stages)
	if err != nil {
		return nil, err
	}
	socketOf(h.docker, view.ID)
	return connect.NewResponse(&hostagentv1.CreateSandboxResponse{
		SandboxId: string(view.ID), Status: string(view.State), HostIp: view.HostIP, Stages: stagesOf(view.Stages),
	}), nil
}

// DestroySandbox implements the RPC.
func (h *hostAgent) DestroySandbox(ctx context.Context, r *connect.Request[hostagentv1.DestroySandboxRequest]) (*connect.Response[hostagentv1.DestroySandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return answer(&hostagentv1.DestroySandboxResponse{}, h.boxes.Destroy(ctx, id))
}

// PauseSandbox implements the RPC.
func (h *hostAgent) PauseSandbox(ctx context.Context, r *connect.Request[hostagentv1.PauseSandboxRequest]) (*connect.Response[hostagentv1.PauseSandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return answer(&hostagentv1.PauseSandboxResponse{}, h.boxes.Pause(ctx, id))
}

// ResumeSandbox implements the RPC.
func (h *hostAgent) ResumeSandbox(ctx context.Context, r *connect.Request[hostagentv1.ResumeSandboxRequest]) (*connect.Response[hostagentv1.ResumeSandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return answer(&hostagentv1.ResumeSandboxResponse{}, h.boxes.Resume(ctx, id))
}

// Exec implements the RPC.
func (h *hostAgent) Exec(ctx context.Context, r *connect.Request[hostagentv1.ExecRequest]) (*connect.Response[hostagentv1.ExecResponse], error) {
	start := time.Now()
	res, err := h.exec(ctx, r.Msg)
	h.meter.ExecEnded(err, time.Since(start))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resultOf(res)), nil
}

// exec holds the sandbox active for as long as the command runs.
func (h *hostAgent) exec(ctx context.Context, m *hostagentv1.ExecRequest) (guestconn.Result, error) {
	id, err := idOf(m.GetSandboxId())
	if err != nil {
		return guestconn.Result{}, err
	}
	guest, done, err := h.boxes.Use(ctx, id)
	if err != nil {
		return guestconn.Result{}, err
	}
	defer done()
	return guest.Exec(ctx, execOf(m))
}

// ListSandboxes implements the RPC.
func (h *hostAgent) ListSandboxes(context.Context, *connect.Request[hostagentv1.ListSandboxesRequest]) (*connect.Response[hostagentv1.ListSandboxesResponse], error) {
	res := &hostagentv1.ListSandboxesResponse{}
	for _, view := range h.boxes.List() {
		res.Sandboxes = append(res.Sandboxes, infoOf(view, time.Now()))
	}
	return connect.NewResponse(res), nil
}

// answer is m, or err.
func answer[M any](m *M, err error) (*connect.Response[M], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}
