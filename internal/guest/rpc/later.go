package rpc

import (
	"context"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
)

// noKubernetes answers for what this version of the agent does not bring.
func (s *agentService) noKubernetes() error {
	return fault.New(fault.Unimplemented, "hutch-agent %s does not manage Kubernetes: "+
		"start it by a command in the sandbox", s.p.Version)
}

// StartKubernetes is not in this version.
func (s *agentService) StartKubernetes(context.Context, *connect.Request[arcboxv1.KubernetesStartRequest],
) (*connect.Response[arcboxv1.KubernetesStartResponse], error) {
	return nil, s.noKubernetes()
}

// StopKubernetes is not in this version.
func (s *agentService) StopKubernetes(context.Context, *connect.Request[arcboxv1.KubernetesStopRequest],
) (*connect.Response[arcboxv1.KubernetesStopResponse], error) {
	return nil, s.noKubernetes()
}

// DeleteKubernetes is not in this version.
func (s *agentService) DeleteKubernetes(context.Context, *connect.Request[arcboxv1.KubernetesDeleteRequest],
) (*connect.Response[arcboxv1.KubernetesDeleteResponse], error) {
	return nil, s.noKubernetes()
}

// GetKubernetesStatus is not in this version.
func (s *agentService) GetKubernetesStatus(context.Context, *connect.Request[arcboxv1.KubernetesStatusRequest],
) (*connect.Response[arcboxv1.KubernetesStatusResponse], error) {
	return nil, s.noKubernetes()
}

// GetKubeconfig is not in this version.
func (s *agentService) GetKubeconfig(context.Context, *connect.Request[arcboxv1.KubernetesKubeconfigRequest],
) (*connect.Response[arcboxv1.KubernetesKubeconfigResponse], error) {
	return nil, s.noKubernetes()
}
