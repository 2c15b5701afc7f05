package rpc

import (
	"context"
	"testing"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/kubernetes"
	"github.com/hutch-run/hutch/internal/testenv"
)

// cluster stands for a *kubernetes.Cluster.
type cluster struct {
	status kubernetes.Status
	ended  kubernetes.Ended
	config kubernetes.Kubeconfig
	err    error
}

var _ Kubernetes = (*kubernetes.Cluster)(nil)

func (c *cluster) Start(context.Context) (kubernetes.Status, error) { return c.status, c.err }
func (c *cluster) Stop(context.Context) (kubernetes.Ended, error)   { return c.ended, c.err }
func (c *cluster) Delete(context.Context) (kubernetes.Ended, error) { return c.ended, c.err }
func (c *cluster) Status() kubernetes.Status                        { return c.status }
func (c *cluster) Kubeconfig() (kubernetes.Kubeconfig, error)       { return c.config, c.err }

func TestKubernetes(t *testing.T) {
	g := &guest{cluster: cluster{
		status: kubernetes.Status{Running: true, APIReady: true, NodeReady: true, Endpoint: "https://x", Detail: "d", Services: []kubernetes.Service{
			{Name: "kubelet", State: "error", Detail: "dead", Crashes: 3},
		}},
		ended:  kubernetes.Ended{Stopped: true, Detail: "gone"},
		config: kubernetes.Kubeconfig{YAML: "y", Context: "c", Endpoint: "https://x"},
	}}
	c, _ := serve(t, g)
	ctx := testenv.Context(t)
	start, e1 := c.StartKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStartRequest{}))
	stop, e2 := c.StopKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStopRequest{}))
	wipe, e3 := c.DeleteKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesDeleteRequest{}))
	status, e4 := c.GetKubernetesStatus(ctx, connect.NewRequest(&arcboxv1.KubernetesStatusRequest{}))
	config, e5 := c.GetKubeconfig(ctx, connect.NewRequest(&arcboxv1.KubernetesKubeconfigRequest{}))
	for _, err := range []error{e1, e2, e3, e4, e5} {
		if err != nil {
			t.Fatal(err)
		}
	}
	same(t, &arcboxv1.KubernetesStartResponse{Running: true, ApiReady: true, Endpoint: "https://x", Detail: "d"}, start.Msg)
	same(t, &arcboxv1.KubernetesStopResponse{Stopped: true, Detail: "gone"}, stop.Msg)
	same(t, &arcboxv1.KubernetesDeleteResponse{Detail: "gone"}, wipe.Msg)
	same(t, &arcboxv1.KubernetesStatusResponse{
		Running: true, ApiReady: true, NodeReady: true, Endpoint: "https://x", Detail: "d",
		Services: []*arcboxv1.ServiceStatus{{Name: "kubelet", Status: "error", Detail: "dead", Crashes: 3}},
	}, status.Msg)
	same(t, &arcboxv1.KubernetesKubeconfigResponse{Kubeconfig: "y", ContextName: "c", Endpoint: "https://x"}, config.Msg)

	g.cluster.err = fault.New(fault.NotFound, "there is none")
	_, e1 = c.StartKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStartRequest{}))
	_, e2 = c.StopKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStopRequest{}))
	_, e3 = c.DeleteKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesDeleteRequest{}))
	_, e5 = c.GetKubeconfig(ctx, connect.NewRequest(&arcboxv1.KubernetesKubeconfigRequest{}))
	for i, err := range []error{e1, e2, e3, e5} {
		if !fault.Is(err, fault.NotFound) {
			t.Errorf("call %d: %v", i, err)
		}
	}
}
