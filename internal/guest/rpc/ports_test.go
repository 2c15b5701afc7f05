package rpc

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/gen/arcbox/v1/arcboxv1connect"
	"github.com/hutch-run/hutch/internal/guest/ports"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/testenv"
)

// publisher is a source with one container, which ends when it is told to.
type publisher struct{ end chan struct{} }

func (p publisher) Run(ctx context.Context, to *ports.Sink) {
	to.Replace([]ports.Owner{{ID: "c1", Name: "web", Bindings: []ports.Binding{
		{ContainerPort: 80, HostPort: 8080, Protocol: "tcp", HostIP: "127.0.0.1"}, {ContainerPort: 53, Protocol: "udp"},
	}}})
	select {
	case <-p.end:
		to.Remove("c1")
	case <-ctx.Done():
	}
	<-ctx.Done()
}

func wantPorts() []*arcboxv1.WatchPortsResponse {
	return []*arcboxv1.WatchPortsResponse{
		{Sequence: 1, Event: &arcboxv1.WatchPortsResponse_Changed{Changed: &arcboxv1.PortBindingsChanged{
			ContainerId: "c1", Name: "web", Bindings: []*arcboxv1.PortBinding{
				{ContainerPort: 80, HostPort: 8080, Protocol: "tcp", HostIp: "127.0.0.1"}, {ContainerPort: 53, Protocol: "udp"},
			},
		}}},
		{Sequence: 1, Event: &arcboxv1.WatchPortsResponse_Synced{Synced: &arcboxv1.PortsSynced{}}},
		{Sequence: 2, Event: &arcboxv1.WatchPortsResponse_Removed{Removed: &arcboxv1.PortBindingsRemoved{ContainerId: "c1"}}},
	}
}

func TestWatchPorts(t *testing.T) {
	board := ports.New(slog.New(slog.DiscardHandler))
	t.Cleanup(board.Close)
	srv := httptest.NewServer(New(Params{Log: slog.New(slog.DiscardHandler), Ports: board}))
	t.Cleanup(srv.Close)
	c := arcboxv1connect.NewAgentServiceClient(srv.Client(), srv.URL, rpcx.ClientOptions()...)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	defer cancel()
	p := publisher{make(chan struct{})}
	board.Start("docker", p)
	stream, err := c.WatchPorts(ctx, connect.NewRequest(&arcboxv1.WatchPortsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for i, want := range wantPorts() {
		if i == 2 {
			close(p.end)
		}
		if !stream.Receive() {
			t.Fatal(stream.Err())
		}
		same(t, want, stream.Msg())
	}
	cancel()
}

// TestTellPorts: nothing is said before something was started.
func TestTellPorts(t *testing.T) {
	board := ports.New(slog.New(slog.DiscardHandler))
	t.Cleanup(board.Close)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	defer cancel()
	told := make(chan *arcboxv1.WatchPortsResponse)
	done := make(chan error)
	go func() {
		done <- TellPorts(board)(ctx, nil, func(b []byte) error {
			m := &arcboxv1.WatchPortsResponse{}
			if err := proto.Unmarshal(b, m); err != nil {
				return err
			}
			select {
			case told <- m:
			case <-ctx.Done():
			}
			return nil
		})
	}()
	select {
	case m := <-told:
		t.Fatalf("told %v of nothing", m)
	case err := <-done:
		t.Fatal(err)
	default:
	}
	p := publisher{make(chan struct{})}
	board.Start("docker", p)
	for i, want := range wantPorts() {
		if i == 2 {
			close(p.end)
		}
		same(t, want, <-told)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("a call that was given up ended well")
	}
}
