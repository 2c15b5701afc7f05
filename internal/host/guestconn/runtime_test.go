package guestconn

import (
	"context"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// EnsureRuntime starts what is asked for, and says something odd when it is
// not.
func (a *agent) EnsureRuntime(_ context.Context, r *connect.Request[arcboxv1.RuntimeEnsureRequest]) (*connect.Response[arcboxv1.RuntimeEnsureResponse], error) {
	m := &arcboxv1.RuntimeEnsureResponse{Status: "perhaps"}
	if r.Msg.GetStartIfNeeded() {
		m = &arcboxv1.RuntimeEnsureResponse{Status: "reused", Ready: true, Endpoint: "unix:///run/docker.sock", Message: "up\nsince " + strings.Repeat("x", 2*maxText)}
	}
	return connect.NewResponse(m), nil
}

func (a *agent) GetRuntimeStatus(context.Context, *connect.Request[arcboxv1.RuntimeStatusRequest]) (*connect.Response[arcboxv1.RuntimeStatusResponse], error) {
	m := &arcboxv1.RuntimeStatusResponse{ContainerdReady: true, Detail: "loading"}
	for range 2 * maxTexts {
		m.Services = append(m.Services, &arcboxv1.ServiceStatus{Name: "dockerd", Status: "error", Detail: "exit 1", Crashes: 3})
	}
	return connect.NewResponse(m), nil
}

func (a *agent) GetKubernetesStatus(context.Context, *connect.Request[arcboxv1.KubernetesStatusRequest]) (*connect.Response[arcboxv1.KubernetesStatusResponse], error) {
	return connect.NewResponse(&arcboxv1.KubernetesStatusResponse{Running: true, ApiReady: true, NodeReady: true, Endpoint: "https://127.0.0.1:6443", Detail: "fine"}), nil
}

func TestRuntimeCalls(t *testing.T) {
	c, ctx := connectTo(t, startAgent(t)), testenv.Context(t)
	e, err := c.EnsureRuntime(ctx, true)
	if err != nil || !e.Ready || e.Status != EnsureReused || e.Endpoint != "unix:///run/docker.sock" || len(e.Message) != maxText || strings.Contains(e.Message, "\n") {
		t.Errorf("ensured: %+v, %v", e, err)
	}
	if e, err := c.EnsureRuntime(ctx, false); !fault.Is(err, fault.Internal) || !strings.Contains(err.Error(), "perhaps") {
		t.Errorf("an odd answer: %+v, %v", e, err)
	}
	s, err := c.RuntimeStatus(ctx)
	want := RuntimeStatus{Containerd: true, Detail: "loading", Services: slices.Repeat([]Service{{Name: "dockerd", Status: "error", Detail: "exit 1", Crashes: 3}}, maxTexts)}
	if d := cmp.Diff(want, s); d != "" || err != nil {
		t.Error(d, err)
	}
	k, err := c.KubernetesStatus(ctx)
	if d := cmp.Diff(ClusterStatus{Running: true, APIReady: true, NodeReady: true, Endpoint: "https://127.0.0.1:6443", Detail: "fine"}, k); d != "" || err != nil {
		t.Error(d, err)
	}
	if _, err := c.StartKubernetes(ctx); !fault.Is(err, fault.Unimplemented) {
		t.Errorf("an agent that can't: %v", err)
	}
}
