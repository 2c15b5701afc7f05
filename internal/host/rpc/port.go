package rpc

import (
	"context"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/ports"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Ports knows what sandboxes publish. It is *ports.Table.
type Ports interface {
	// List returns all bindings, or those of one sandbox.
	List(id sandbox.ID) []ports.Published
}

// portList serves hostagent.v1.PortService.
type portList struct {
	ports Ports
	boxes lifecycle.Sandboxes
}

// ListPorts implements the RPC.
func (p *portList) ListPorts(_ context.Context, r *connect.Request[hostagentv1.ListPortsRequest]) (*connect.Response[hostagentv1.ListPortsResponse], error) {
	var id sandbox.ID
	if asked := r.Msg.GetSandboxId(); asked != "" {
		v, err := p.boxes.Get(asked)
		if err != nil {
			return nil, err
		}
		id = v.ID
	}
	res := &hostagentv1.ListPortsResponse{}
	for _, l := range p.ports.List(id) {
		m := &hostagentv1.PublishedPort{
			SandboxId: string(l.Sandbox), Owner: l.Owner, Name: l.Name, Protocol: l.Protocol,
			HostPort: uint32(l.Port), ContainerPort: uint32(l.ContainerPort), HostIp: l.HostIP, Problem: l.Problem,
		}
		for _, a := range l.Addresses {
			m.HostAddresses = append(m.HostAddresses, a.String())
		}
		res.Ports = append(res.Ports, m)
	}
	return connect.NewResponse(res), nil
}
