package rpc

import (
	"context"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/snapshot"
)

// snapshots serves hostagent.v1.SnapshotService.
type snapshots struct {
	snapshots Snapshots
	docker    Docker // nil: none
}

// ForkSandbox implements the RPC.
func (s *snapshots) ForkSandbox(ctx context.Context, r *connect.Request[hostagentv1.ForkSandboxRequest]) (*connect.Response[hostagentv1.ForkSandboxResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	forked, err := s.snapshots.Fork(ctx, id, max(1, int(r.Msg.GetCount())))
	if err != nil {
		return nil, err
	}
	res := &hostagentv1.ForkSandboxResponse{StoppedMicros: forked.Stopped.Microseconds()}
	for _, v := range forked.Views {
		socketOf(s.docker, v.ID)
		res.Forks = append(res.Forks, &hostagentv1.ForkSandboxResponse_Fork{
			SandboxId: string(v.ID), HostIp: v.HostIP, Stages: stagesOf(v.Stages),
		})
	}
	return connect.NewResponse(res), nil
}

// CreateSnapshot implements the RPC.
func (s *snapshots) CreateSnapshot(ctx context.Context, r *connect.Request[hostagentv1.CreateSnapshotRequest]) (*connect.Response[hostagentv1.CreateSnapshotResponse], error) {
	id, err := idOf(r.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	made, stopped, err := s.snapshots.CreateSnapshot(ctx, id, r.Msg.GetName())
	return answer(&hostagentv1.CreateSnapshotResponse{Snapshot: snapshotTo(made), StoppedMicros: stopped.Microseconds()}, err)
}

// ListSnapshots implements the RPC.
func (s *snapshots) ListSnapshots(context.Context, *connect.Request[hostagentv1.ListSnapshotsRequest]) (*connect.Response[hostagentv1.ListSnapshotsResponse], error) {
	res := &hostagentv1.ListSnapshotsResponse{}
	for _, v := range s.snapshots.Snapshots() {
		res.Snapshots = append(res.Snapshots, snapshotTo(v))
	}
	return connect.NewResponse(res), nil
}

// VerifySnapshot implements the RPC.
func (s *snapshots) VerifySnapshot(ctx context.Context, r *connect.Request[hostagentv1.VerifySnapshotRequest]) (*connect.Response[hostagentv1.VerifySnapshotResponse], error) {
	v, err := s.snapshots.VerifySnapshot(ctx, r.Msg.GetSnapshot())
	return answer(&hostagentv1.VerifySnapshotResponse{Snapshot: snapshotTo(v)}, err)
}

// DeleteSnapshot implements the RPC.
func (s *snapshots) DeleteSnapshot(_ context.Context, r *connect.Request[hostagentv1.DeleteSnapshotRequest]) (*connect.Response[hostagentv1.DeleteSnapshotResponse], error) {
	return answer(&hostagentv1.DeleteSnapshotResponse{}, s.snapshots.DeleteSnapshot(r.Msg.GetSnapshot(), r.Msg.GetForce()))
}

func snapshotTo(v lifecycle.SnapshotView) *hostagentv1.Snapshot {
	return &hostagentv1.Snapshot{
		SnapshotId:       v.ID,
		Name:             v.Name,
		Kind:             string(v.Kind),
		CreatedAtUnix:    unixSeconds(v.CreatedAt),
		Vcpus:            int32(v.Fits.VCPUs),
		MemoryMb:         int32(v.Fits.MemoryMB),
		DiskSizeMb:       int32(v.DiskMB),
		MemoryBytes:      v.Memory.Stored,
		DiskBytes:        v.Stored(),
		InMemory:         v.InRAM,
		ImageDigest:      v.ImageDigest,
		Template:         v.Template,
		SourceSandboxId:  string(v.Source),
		ParentSnapshotId: v.Parent,
		SandboxIds:       texts(v.Users),
		Problem:          v.Problem,
		Vmm:              v.Fits.VMM,
		VmmVersion:       v.Fits.VMMVersion,
		Accel:            v.Fits.Accel,
		KernelId:         v.Fits.KernelID,
		Ready:            string(v.Ready),
	}
}

// templateOfSnapshot is a named snapshot among the templates.
func templateOfSnapshot(v lifecycle.SnapshotView) *hostagentv1.Template {
	return &hostagentv1.Template{
		Name: v.Name, ImageDigest: v.ImageDigest, Source: "snapshot of " + string(v.Source),
		Env: v.Env, User: v.User, Cwd: v.Cwd, Vcpus: int32(v.Fits.VCPUs), MemoryMb: int32(v.Fits.MemoryMB), DiskSizeMb: int32(v.DiskMB),
		SizeBytes: sizeOf(v.Manifest), DiskBytes: v.Stored(), CreatedAtUnix: unixSeconds(v.CreatedAt), SnapshotId: v.ID,
	}
}

func sizeOf(m snapshot.Manifest) int64 {
	n := m.State.Size + m.Memory.Size
	if m.Data != nil {
		n += m.Data.Size
	}
	return n
}

func texts[T ~string](ids []T) []string {
	out := make([]string, 0, len(ids))
	for _, id := range ids {
		out = append(out, string(id))
	}
	return out
}
