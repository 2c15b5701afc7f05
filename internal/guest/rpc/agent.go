package rpc

import (
	"context"
	"time"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/clock"
)

// agentService serves arcbox.v1.AgentService.
type agentService struct{ p Params }

// Ping answers, and brings the clock to the host's time. A clock that can't be
// changed is logged and no failure of the Ping: the guest is alive.
func (s *agentService) Ping(ctx context.Context, r *connect.Request[arcboxv1.AgentPingRequest],
) (*connect.Response[arcboxv1.AgentPingResponse], error) {
	done, err := s.p.Clock.Sync(hostTime(r.Msg))
	if fault.Is(err, fault.Invalid) {
		return nil, err
	}
	if err != nil {
		s.p.Log.WarnContext(ctx, "clock not set", "err", err)
	}
	return connect.NewResponse(&arcboxv1.AgentPingResponse{
		Message: pong(r.Msg.GetMessage()), Version: s.p.Version,
		Clock: string(done.Action), ClockOffsetNanos: done.Offset.Nanoseconds(),
	}), nil
}

func pong(message string) string {
	if message == "" {
		return "pong"
	}
	return "pong: " + message
}

func hostTime(m *arcboxv1.AgentPingRequest) clock.HostTime {
	return clock.HostTime{
		Secs:  m.GetTimestampSecs(),
		Nanos: m.GetTimestampNanos(),
		Exact: m.TimestampNanos != nil,
	}
}

// GetSystemInfo describes the machine.
func (s *agentService) GetSystemInfo(context.Context, *connect.Request[arcboxv1.Empty],
) (*connect.Response[arcboxv1.SystemInfo], error) {
	i, err := s.p.Info.Read()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.SystemInfo{
		KernelVersion: i.Kernel, OsName: i.OSName, OsVersion: i.OSVersion, Arch: i.Arch, Hostname: i.Hostname,
		TotalMemory: i.TotalMemory, AvailableMemory: i.AvailableMemory, CpuCount: i.CPUs,
		LoadAverage: i.Load[:], Uptime: i.Uptime, IpAddresses: i.Addresses,
	}), nil
}

// Shutdown acknowledges; the rest happens behind the answer.
func (s *agentService) Shutdown(_ context.Context, r *connect.Request[arcboxv1.ShutdownRequest],
) (*connect.Response[arcboxv1.ShutdownResponse], error) {
	s.p.Power.Shutdown(time.Duration(r.Msg.GetTimeoutSeconds()) * time.Second)
	return connect.NewResponse(&arcboxv1.ShutdownResponse{Accepted: true}), nil
}

// DiskTrim gives unused blocks back.
func (s *agentService) DiskTrim(ctx context.Context, _ *connect.Request[arcboxv1.DiskTrimRequest],
) (*connect.Response[arcboxv1.DiskTrimResponse], error) {
	t, err := s.p.Power.Trim(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.DiskTrimResponse{Result: t.String(), BytesTrimmed: t.Total()}), nil
}
