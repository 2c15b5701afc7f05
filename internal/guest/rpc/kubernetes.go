package rpc

import (
	"context"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/guest/kubernetes"
)

// Kubernetes is the cluster in the guest; a *kubernetes.Cluster.
type Kubernetes interface {
	Start(ctx context.Context) (kubernetes.Status, error)
	Stop(ctx context.Context) (kubernetes.Ended, error)
	Delete(ctx context.Context) (kubernetes.Ended, error)
	Status() kubernetes.Status
	Kubeconfig() (kubernetes.Kubeconfig, error)
}

// StartKubernetes asks for the cluster.
func (s *agentService) StartKubernetes(ctx context.Context, _ *connect.Request[arcboxv1.KubernetesStartRequest],
) (*connect.Response[arcboxv1.KubernetesStartResponse], error) {
	st, err := s.p.Kubernetes.Start(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.KubernetesStartResponse{
		Running: st.Running, ApiReady: st.APIReady, Endpoint: st.Endpoint, Detail: st.Detail,
	}), nil
}

// StopKubernetes ends the cluster and what it left behind.
func (s *agentService) StopKubernetes(ctx context.Context, _ *connect.Request[arcboxv1.KubernetesStopRequest],
) (*connect.Response[arcboxv1.KubernetesStopResponse], error) {
	e, err := s.p.Kubernetes.Stop(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.KubernetesStopResponse{Stopped: e.Stopped, Detail: e.Detail}), nil
}

// DeleteKubernetes wipes the state of the cluster.
func (s *agentService) DeleteKubernetes(ctx context.Context, _ *connect.Request[arcboxv1.KubernetesDeleteRequest],
) (*connect.Response[arcboxv1.KubernetesDeleteResponse], error) {
	e, err := s.p.Kubernetes.Delete(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.KubernetesDeleteResponse{Detail: e.Detail}), nil
}

// GetKubernetesStatus tells what of the cluster is up.
func (s *agentService) GetKubernetesStatus(context.Context, *connect.Request[arcboxv1.KubernetesStatusRequest],
) (*connect.Response[arcboxv1.KubernetesStatusResponse], error) {
	st := s.p.Kubernetes.Status()
	m := &arcboxv1.KubernetesStatusResponse{
		Running: st.Running, ApiReady: st.APIReady, NodeReady: st.NodeReady, Endpoint: st.Endpoint, Detail: st.Detail,
	}
	for _, sv := range st.Services {
		m.Services = append(m.Services, &arcboxv1.ServiceStatus{Name: sv.Name, Status: sv.State, Detail: sv.Detail, Crashes: sv.Crashes})
	}
	return connect.NewResponse(m), nil
}

// GetKubeconfig returns credentials for the cluster, as they are in the guest.
func (s *agentService) GetKubeconfig(context.Context, *connect.Request[arcboxv1.KubernetesKubeconfigRequest],
) (*connect.Response[arcboxv1.KubernetesKubeconfigResponse], error) {
	k, err := s.p.Kubernetes.Kubeconfig()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&arcboxv1.KubernetesKubeconfigResponse{Kubeconfig: k.YAML, ContextName: k.Context, Endpoint: k.Endpoint}), nil
}
