package rpc

import (
	"net/netip"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/gen/hostagent/v1/hostagentv1connect"
	"github.com/hutch-run/hutch/internal/host/ports"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/testenv"
)

// published is what one sandbox publishes.
type published struct{}

func (published) List(id sandbox.ID) []ports.Published {
	if id != "" && id != "sb-1" {
		return nil
	}
	return []ports.Published{{
		Sandbox: "sb-1", Owner: "c", Name: "web", Binding: ports.Binding{Protocol: "tcp", HostIP: "::", ContainerPort: 80}, Port: 40000,
		Addresses: []netip.Addr{netip.IPv6Loopback()}, Problem: "p",
	}}
}

func TestListPorts(t *testing.T) {
	w := newWorld(t)
	ctx := testenv.Context(t)
	c := hostagentv1connect.NewPortServiceClient(w.client(t, false), w.url())
	if _, err := c.ListPorts(ctx, connect.NewRequest(&hostagentv1.ListPortsRequest{SandboxId: "sb-9"})); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("of a sandbox that is not there: %v", err)
	}
	res, err := c.ListPorts(ctx, connect.NewRequest(&hostagentv1.ListPortsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	want := &hostagentv1.ListPortsResponse{Ports: []*hostagentv1.PublishedPort{{
		SandboxId: "sb-1", Owner: "c", Name: "web", Protocol: "tcp", HostAddresses: []string{"::1"}, HostPort: 40000, ContainerPort: 80,
		HostIp: "::", Problem: "p",
	}}}
	if d := cmp.Diff(want, res.Msg, protocmp.Transform()); d != "" {
		t.Error(d)
	}
}
