package rpc

import (
	"context"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/guest/runtime"
	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// Runtime is Docker in the guest; a *runtime.Runtime.
type Runtime interface {
	Ensure(ctx context.Context, start bool) runtime.Ensured
	Status(ctx context.Context) runtime.Report
}

// Logs are what the guest's services write; a *supervise.Supervisor does it,
// once their units are defined.
type Logs interface {
	Follow(ctx context.Context, service string, tail int, follow bool, send func(supervise.Chunk) error) error
}

// EnsureRuntime asks for containerd and dockerd.
func (s *agentService) EnsureRuntime(ctx context.Context, r *connect.Request[arcboxv1.RuntimeEnsureRequest],
) (*connect.Response[arcboxv1.RuntimeEnsureResponse], error) {
	e := s.p.Runtime.Ensure(ctx, r.Msg.GetStartIfNeeded())
	return connect.NewResponse(&arcboxv1.RuntimeEnsureResponse{
		Ready: e.Ready, Endpoint: e.Endpoint, Message: e.Message, Status: e.Status,
	}), nil
}

// GetRuntimeStatus tells what of the runtime is up.
func (s *agentService) GetRuntimeStatus(ctx context.Context, _ *connect.Request[arcboxv1.RuntimeStatusRequest],
) (*connect.Response[arcboxv1.RuntimeStatusResponse], error) {
	rep := s.p.Runtime.Status(ctx)
	m := &arcboxv1.RuntimeStatusResponse{
		ContainerdReady: rep.Containerd, DockerReady: rep.Docker, Endpoint: runtime.Endpoint, Detail: rep.Detail,
	}
	for _, sv := range rep.Services {
		m.Services = append(m.Services, &arcboxv1.ServiceStatus{Name: sv.Name, Status: sv.Status, Detail: sv.Detail, Crashes: sv.Crashes})
	}
	return connect.NewResponse(m), nil
}

// FollowServiceLog returns what a service writes.
func (s *agentService) FollowServiceLog(ctx context.Context, r *connect.Request[arcboxv1.FollowServiceLogRequest],
	stream *connect.ServerStream[arcboxv1.FollowServiceLogResponse],
) error {
	if err := stream.Send(nil); err != nil { // the headers: a log may be silent for long
		return err
	}
	m := r.Msg
	return s.p.Logs.Follow(ctx, m.GetService(), int(min(m.GetTailLines(), 1<<30)), m.GetFollow(), func(c supervise.Chunk) error {
		return stream.Send(&arcboxv1.FollowServiceLogResponse{Data: c.Data, LostBytes: c.Lost})
	})
}
