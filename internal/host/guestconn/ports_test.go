package guestconn

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// tellPorts tells one of each, and what a later agent may say.
func (a *agent) tellPorts(ctx context.Context, _ []byte, send func([]byte) error) error {
	for _, m := range []*arcboxv1.WatchPortsResponse{
		{Sequence: 1, Event: &arcboxv1.WatchPortsResponse_Changed{Changed: &arcboxv1.PortBindingsChanged{
			ContainerId: "c", Name: "n", Bindings: []*arcboxv1.PortBinding{
				{ContainerPort: 80, HostPort: 8080, Protocol: "tcp", HostIp: "::"}, {ContainerPort: 80, HostPort: 70000}, {ContainerPort: 1 << 20},
			},
		}}},
		{},
		{Event: &arcboxv1.WatchPortsResponse_Removed{Removed: &arcboxv1.PortBindingsRemoved{ContainerId: "d"}}},
		{Event: &arcboxv1.WatchPortsResponse_Synced{Synced: &arcboxv1.PortsSynced{}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			return err
		}
		if err := send(b); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return ctx.Err()
}

func TestWatchPorts(t *testing.T) {
	c := connectTo(t, startAgent(t))
	enough := errors.New("enough")
	var got []PortEvent
	err := c.WatchPorts(testenv.Context(t), func(e PortEvent) error {
		if got = append(got, e); e.Kind == PortsSynced {
			return enough
		}
		return nil
	})
	want := []PortEvent{
		{Kind: PortsChanged, Owner: "c", Name: "n", Bindings: []PortBinding{{Protocol: "tcp", HostIP: "::", HostPort: 8080, ContainerPort: 80}}},
		{Kind: PortsRemoved, Owner: "d"}, {Kind: PortsSynced},
	}
	if d := cmp.Diff(want, got); d != "" || !errors.Is(err, enough) {
		t.Error(d, err)
	}
}

// TestWatchPortsIsLost with the link, and ends with its caller.
func TestWatchPortsIsLost(t *testing.T) {
	a := startAgent(t)
	c := connectTo(t, a)
	err := c.WatchPorts(testenv.Context(t), func(e PortEvent) error {
		if e.Kind == PortsSynced {
			a.cut()
		}
		return nil
	})
	if !fault.Is(err, fault.Unavailable) {
		t.Errorf("a link that is cut: %v", err)
	}
	ctx, cancel := context.WithCancel(testenv.Context(t))
	err = c.WatchPorts(ctx, func(PortEvent) error {
		cancel()
		return nil
	})
	if !fault.Is(err, fault.Canceled) {
		t.Errorf("a caller that left: %v", err)
	}
}
