package rpc

import (
	"context"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/snapshot"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// stills is a stock of snapshots without machines.
type stills struct {
	list   []lifecycle.SnapshotView
	forced bool
}

func (s *stills) WarmTemplate(_ context.Context, spec sandbox.Spec, ready snapshot.Ready) (*snapshot.Snapshot, error) {
	return &snapshot.Snapshot{Manifest: snapshot.Manifest{ID: "sn-w", Ready: ready, DiskMB: spec.DiskMB, Fits: snapshot.Fits{VCPUs: spec.VCPUs, MemoryMB: spec.MemoryMB}}}, nil
}

func (s *stills) Fork(_ context.Context, id sandbox.ID, count int) (lifecycle.Forked, error) {
	if id != "sb-1" {
		return lifecycle.Forked{}, fault.New(fault.NotFound, "no sandbox %s", id)
	}
	f := lifecycle.Forked{Stopped: 3 * time.Millisecond}
	for range count {
		f.Views = append(f.Views, lifecycle.View{Record: sandbox.Record{
			ID: "sb-f", HostIP: "198.19.0.9", Stages: []sandbox.Stage{{Name: "restore", Took: time.Millisecond}},
		}})
	}
	return f, nil
}

func (s *stills) CreateSnapshot(_ context.Context, id sandbox.ID, name string) (lifecycle.SnapshotView, time.Duration, error) {
	v := lifecycle.SnapshotView{
		Manifest: snapshot.Manifest{
			ID: "sn-1", Name: name, Kind: snapshot.Named, CreatedAt: time.Unix(1700000000, 0), Source: id, Parent: "sn-0", Template: "minimal",
			DiskMB: 64, ImageDigest: "sha256:1", Fits: snapshot.Fits{VMM: "qemu", VMMVersion: "7", Accel: "tcg", KernelID: "k", VCPUs: 2, MemoryMB: 128},
			State: snapshot.Part{Size: 10, Stored: 1}, Memory: snapshot.Part{Size: 100, Stored: 20}, Data: &snapshot.Part{Size: 1000, Stored: 300},
		},
		Users: []sandbox.ID{"sb-7"}, InRAM: true, Problem: "its kernel is gone",
	}
	s.list = append(s.list, v)
	return v, 5 * time.Millisecond, nil
}

func (s *stills) Snapshots() []lifecycle.SnapshotView { return s.list }

func (s *stills) VerifySnapshot(_ context.Context, name string) (lifecycle.SnapshotView, error) {
	if name == "bad" {
		return lifecycle.SnapshotView{}, fault.New(fault.Internal, "snapshot bad is damaged")
	}
	return s.list[0], nil
}

func (s *stills) DeleteSnapshot(name string, force bool) error {
	s.forced = force
	if !force {
		return fault.New(fault.Precondition, "sandboxes were made from %s", name)
	}
	s.list = nil
	return nil
}

func (w *world) snapshots(t *testing.T) hostagentv1connect.SnapshotServiceClient {
	t.Helper()
	return hostagentv1connect.NewSnapshotServiceClient(w.client(t, false), w.url())
}

func TestForkSandbox(t *testing.T) {
	w := newWorld(t)
	c, ctx := w.snapshots(t), testenv.Context(t)
	res, err := c.ForkSandbox(ctx, connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: "sb-1"}))
	if err != nil {
		t.Fatal(err)
	}
	want := &hostagentv1.ForkSandboxResponse{StoppedMicros: 3000, Forks: []*hostagentv1.ForkSandboxResponse_Fork{
		{SandboxId: "sb-f", HostIp: "198.19.0.9", Stages: []*hostagentv1.StageTime{{Name: "restore", Micros: 1000}}},
	}}
	if d := cmp.Diff(want, res.Msg, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	for want, m := range map[connect.Code]*hostagentv1.ForkSandboxRequest{
		connect.CodeNotFound: {SandboxId: "sb-2", Count: 3}, connect.CodeInvalidArgument: {SandboxId: "sb-1", Count: 65},
	} {
		if _, err := c.ForkSandbox(ctx, connect.NewRequest(m)); connect.CodeOf(err) != want {
			t.Errorf("%v: %v, want %v", m, err, want)
		}
	}
}

func TestSnapshots(t *testing.T) {
	w := newWorld(t)
	c, ctx := w.snapshots(t), testenv.Context(t)
	made, err := c.CreateSnapshot(ctx, connect.NewRequest(&hostagentv1.CreateSnapshotRequest{SandboxId: "sb-1", Name: "ready"}))
	if err != nil {
		t.Fatal(err)
	}
	want := &hostagentv1.Snapshot{
		SnapshotId: "sn-1", Name: "ready", Kind: "named", CreatedAtUnix: 1700000000, Vcpus: 2, MemoryMb: 128, DiskSizeMb: 64,
		MemoryBytes: 20, DiskBytes: 321, InMemory: true, ImageDigest: "sha256:1", Template: "minimal", SourceSandboxId: "sb-1",
		ParentSnapshotId: "sn-0", SandboxIds: []string{"sb-7"}, Problem: "its kernel is gone",
		Vmm: "qemu", VmmVersion: "7", Accel: "tcg", KernelId: "k",
	}
	if d := cmp.Diff(want, made.Msg.GetSnapshot(), protocmp.Transform()); d != "" || made.Msg.GetStoppedMicros() != 5000 {
		t.Error(d, made.Msg.GetStoppedMicros())
	}
	list, err := c.ListSnapshots(ctx, connect.NewRequest(&hostagentv1.ListSnapshotsRequest{}))
	if err != nil || len(list.Msg.GetSnapshots()) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := c.VerifySnapshot(ctx, connect.NewRequest(&hostagentv1.VerifySnapshotRequest{Snapshot: "bad"})); connect.CodeOf(err) != connect.CodeInternal {
		t.Errorf("damaged: %v", err)
	}
	if _, err := c.DeleteSnapshot(ctx, connect.NewRequest(&hostagentv1.DeleteSnapshotRequest{Snapshot: "ready"})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("in use: %v", err)
	}
	w.snapshotsAmongTemplates(t)
	if _, err := c.DeleteSnapshot(ctx, connect.NewRequest(&hostagentv1.DeleteSnapshotRequest{Snapshot: "ready", Force: true})); err != nil || !w.stills.forced {
		t.Errorf("forced %v: %v", w.stills.forced, err)
	}
}

func TestWarmTemplate(t *testing.T) {
	w := newWorld(t)
	c, ctx := hostagentv1connect.NewTemplateServiceClient(w.client(t, false), w.url()), testenv.Context(t)
	res, err := c.WarmTemplate(ctx, connect.NewRequest(&hostagentv1.WarmTemplateRequest{Name: "docker", Vcpus: 2, MemoryMb: 1024, DiskSizeMb: 64, Ready: "docker"}))
	if err != nil {
		t.Fatal(err)
	}
	want := &hostagentv1.WarmTemplateResponse{SnapshotId: "sn-w", Vcpus: 2, MemoryMb: 1024, DiskSizeMb: 64, Ready: "docker"}
	if d := cmp.Diff(want, res.Msg, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if _, err := c.WarmTemplate(ctx, connect.NewRequest(&hostagentv1.WarmTemplateRequest{Name: "docker", Ready: "postgres"})); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("ready for what nobody knows: %v", err)
	}
}

// snapshotsAmongTemplates looks at the snapshot "ready" as a template.
func (w *world) snapshotsAmongTemplates(t *testing.T) {
	t.Helper()
	ctx := testenv.Context(t)
	c := hostagentv1connect.NewTemplateServiceClient(w.client(t, false), w.url())
	list, err := c.ListTemplates(ctx, connect.NewRequest(&hostagentv1.ListTemplatesRequest{}))
	if err != nil || len(list.Msg.GetTemplates()) != 2 || list.Msg.GetTemplates()[1].GetSnapshotId() != "sn-1" || list.Msg.GetTemplates()[1].GetSizeBytes() != 1110 {
		t.Errorf("%v, %v", list, err)
	}
	one, err := c.InspectTemplate(ctx, connect.NewRequest(&hostagentv1.InspectTemplateRequest{Name: "ready"}))
	if err != nil || one.Msg.GetTemplate().GetSource() != "snapshot of sb-1" || len(one.Msg.GetSandboxIds()) != 1 {
		t.Errorf("%v, %v", one, err)
	}
	if _, err := c.RemoveTemplate(ctx, connect.NewRequest(&hostagentv1.RemoveTemplateRequest{Name: "ready"})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("removed: %v", err)
	}
	build, err := c.BuildTemplate(ctx, connect.NewRequest(&hostagentv1.BuildTemplateRequest{
		Name: "ready", Source: &hostagentv1.BuildTemplateRequest_Recipe{Recipe: "minimal"},
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer build.Close()
	if build.Receive() || connect.CodeOf(build.Err()) != connect.CodeAlreadyExists {
		t.Errorf("built over it: %v", build.Err())
	}
}
