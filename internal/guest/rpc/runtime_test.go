package rpc

import (
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/runtime"
	"github.com/hutch-run/hutch/internal/guest/supervise"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestRuntime(t *testing.T) {
	g := &guest{
		ensured: runtime.Ensured{Ready: true, Endpoint: "unix:///x", Message: "m", Status: runtime.StatusReused},
		report: runtime.Report{Containerd: true, Detail: "d", Services: []runtime.Service{
			{Name: "dockerd", Status: "error", Detail: "dead", Crashes: 3},
		}},
	}
	c, _ := serve(t, g)
	ctx := testenv.Context(t)
	for _, start := range []bool{true, false} {
		r, err := c.EnsureRuntime(ctx, connect.NewRequest(&arcboxv1.RuntimeEnsureRequest{StartIfNeeded: start}))
		if err != nil {
			t.Fatal(err)
		}
		same(t, &arcboxv1.RuntimeEnsureResponse{Ready: true, Endpoint: "unix:///x", Message: "m", Status: "reused"}, r.Msg)
	}
	if diff := cmp.Diff([]bool{true, false}, g.starts); diff != "" {
		t.Errorf("starts (-want +got):\n%s", diff)
	}
	r, err := c.GetRuntimeStatus(ctx, connect.NewRequest(&arcboxv1.RuntimeStatusRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	same(t, &arcboxv1.RuntimeStatusResponse{
		ContainerdReady: true, Endpoint: "unix:///run/docker.sock", Detail: "d",
		Services: []*arcboxv1.ServiceStatus{{Name: "dockerd", Status: "error", Detail: "dead", Crashes: 3}},
	}, r.Msg)
}

func TestFollowServiceLog(t *testing.T) {
	g := &guest{
		chunks: []supervise.Chunk{{Data: []byte("a\n")}, {Data: []byte("b\n"), Lost: 7}},
		err:    fault.New(fault.NotFound, "no more"),
	}
	c, _ := serve(t, g)
	stream, err := c.FollowServiceLog(testenv.Context(t), connect.NewRequest(&arcboxv1.FollowServiceLogRequest{Service: "dockerd", TailLines: 9, Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for _, want := range []*arcboxv1.FollowServiceLogResponse{{Data: []byte("a\n")}, {Data: []byte("b\n"), LostBytes: 7}} {
		if !stream.Receive() {
			t.Fatal(stream.Err())
		}
		same(t, want, stream.Msg())
	}
	if stream.Receive() || !fault.Is(stream.Err(), fault.NotFound) {
		t.Errorf("the end: %v", stream.Err())
	}
	if g.followed != "dockerd 9 true" {
		t.Errorf("asked for %q", g.followed)
	}
}
