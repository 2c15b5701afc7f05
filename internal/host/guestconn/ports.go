package guestconn

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
)

// PortEventKind is what a PortEvent tells.
type PortEventKind uint8

// The kinds.
const (
	PortsChanged PortEventKind = iota + 1 // the full set of one owner
	PortsRemoved                          // an owner that publishes nothing any more
	PortsSynced                           // what this watch has not told is not there
)

// PortEvent is one thing that a guest tells of its ports. Owner, Name and the
// addresses are its own words, of any length and content.
type PortEvent struct {
	Kind        PortEventKind
	Owner, Name string
	Bindings    []PortBinding
}

// PortBinding is one published port.
type PortBinding struct {
	Protocol, HostIP        string
	HostPort, ContainerPort uint16
}

// WatchPorts implements Guest.
func (c *Conn) WatchPorts(ctx context.Context, each func(PortEvent) error) error {
	session, err := c.session(ctx)
	if err != nil {
		return err
	}
	err = session.Stream(ctx, link.CallPorts, nil, func(reply []byte) error {
		var m arcboxv1.WatchPortsResponse
		if err := proto.Unmarshal(reply, &m); err != nil {
			return fmt.Errorf("read what it says: %w", err)
		}
		if e := portEvent(&m); e.Kind != 0 {
			return each(e)
		}
		return nil
	})
	if err == nil {
		err = fault.New(fault.Unavailable, "the guest tells no more")
	}
	return callError("watch ports of guest", err)
}

// portEvent returns what m tells; its Kind is 0 when this hutchd does not know
// it.
func portEvent(m *arcboxv1.WatchPortsResponse) PortEvent {
	switch {
	case m.GetChanged() != nil:
		e := PortEvent{Kind: PortsChanged, Owner: m.GetChanged().GetContainerId(), Name: m.GetChanged().GetName()}
		for _, b := range m.GetChanged().GetBindings() {
			if b.GetHostPort() > 0xffff || b.GetContainerPort() > 0xffff {
				continue
			}
			e.Bindings = append(e.Bindings, PortBinding{
				Protocol: b.GetProtocol(), HostIP: b.GetHostIp(), HostPort: uint16(b.GetHostPort()), ContainerPort: uint16(b.GetContainerPort()),
			})
		}
		return e
	case m.GetRemoved() != nil:
		return PortEvent{Kind: PortsRemoved, Owner: m.GetRemoved().GetContainerId()}
	case m.GetSynced() != nil:
		return PortEvent{Kind: PortsSynced}
	}
	return PortEvent{}
}
