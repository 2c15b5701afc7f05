package rpc

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/guest/ports"
)

// Ports knows what is published; a *ports.Board.
type Ports interface {
	// AwaitStart returns when there is something that could publish.
	AwaitStart(ctx context.Context) error
	Watch() *ports.Watch
}

// WatchPorts tells what is published.
func (s *agentService) WatchPorts(ctx context.Context, _ *connect.Request[arcboxv1.WatchPortsRequest],
	stream *connect.ServerStream[arcboxv1.WatchPortsResponse],
) error {
	return tellPorts(ctx, s.p.Ports, stream.Send)
}

// TellPorts returns the answer to the link's call link.CallPorts. It costs
// nothing until something was started that can publish.
func TellPorts(p Ports) func(context.Context, []byte, func([]byte) error) error {
	return func(ctx context.Context, _ []byte, send func([]byte) error) error {
		if err := p.AwaitStart(ctx); err != nil {
			return err
		}
		return tellPorts(ctx, p, func(m *arcboxv1.WatchPortsResponse) error {
			b, err := proto.Marshal(m)
			if err != nil {
				return err
			}
			return send(b)
		})
	}
}

func tellPorts(ctx context.Context, p Ports, send func(*arcboxv1.WatchPortsResponse) error) error {
	w := p.Watch()
	defer w.Close()
	for {
		e, err := w.Next(ctx)
		if err != nil {
			return err
		}
		if err := send(portsResponse(e)); err != nil {
			return err
		}
	}
}

func portsResponse(e ports.Event) *arcboxv1.WatchPortsResponse {
	m := &arcboxv1.WatchPortsResponse{Sequence: e.Sequence}
	switch e.Kind {
	case ports.Changed:
		c := &arcboxv1.PortBindingsChanged{ContainerId: e.Owner.ID, Name: e.Owner.Name}
		for _, b := range e.Owner.Bindings {
			c.Bindings = append(c.Bindings, &arcboxv1.PortBinding{
				ContainerPort: uint32(b.ContainerPort), HostPort: uint32(b.HostPort), Protocol: b.Protocol, HostIp: b.HostIP,
			})
		}
		m.Event = &arcboxv1.WatchPortsResponse_Changed{Changed: c}
	case ports.Removed:
		m.Event = &arcboxv1.WatchPortsResponse_Removed{Removed: &arcboxv1.PortBindingsRemoved{ContainerId: e.Owner.ID}}
	case ports.Synced:
		m.Event = &arcboxv1.WatchPortsResponse_Synced{Synced: &arcboxv1.PortsSynced{}}
	}
	return m
}
