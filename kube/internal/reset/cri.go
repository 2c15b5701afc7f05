package reset

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// graceNote is where kubelet writes how long a container may take to end, in seconds.
const graceNote = "io.kubernetes.pod.terminationGracePeriod"

// CRI are the pods of a container runtime.
type CRI struct {
	conn   *grpc.ClientConn
	client cri.RuntimeServiceClient
	grace  time.Duration
}

// DialCRI connects to the runtime at a unix:// address, or says why it doesn't answer. No container gets more than grace to end.
func DialCRI(ctx context.Context, address string, grace time.Duration) (*CRI, error) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to the container runtime: %w", err)
	}
	c := &CRI{conn: conn, client: cri.NewRuntimeServiceClient(conn), grace: grace}
	if _, err := c.client.Version(ctx, &cri.VersionRequest{}); err != nil {
		_ = conn.Close() // nothing is in flight
		return nil, fmt.Errorf("connect to the container runtime: %w", err)
	}
	return c, nil
}

// Close ends the connection.
func (c *CRI) Close() error { return c.conn.Close() }

// List implements [Pods].
func (c *CRI) List(ctx context.Context) ([]string, error) {
	resp, err := c.client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, p := range resp.GetItems() {
		ids = append(ids, p.GetId())
	}
	return ids, nil
}

// End implements [Pods].
func (c *CRI) End(ctx context.Context, id string) error {
	resp, err := c.client.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: id}})
	if err != nil {
		return fmt.Errorf("list its containers: %w", err)
	}
	var wg sync.WaitGroup
	for _, k := range resp.GetContainers() {
		if k.GetState() != cri.ContainerState_CONTAINER_RUNNING {
			continue
		}
		// What doesn't end by itself is ended with its sandbox.
		wg.Go(func() {
			_, _ = c.client.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: k.GetId(), Timeout: c.seconds(k)})
		})
	}
	wg.Wait()
	if _, err := c.client.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if _, err := c.client.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}

func (c *CRI) seconds(k *cri.Container) int64 {
	limit := int64(c.grace / time.Second)
	if n, err := strconv.ParseInt(k.GetAnnotations()[graceNote], 10, 64); err == nil && n >= 0 && n < limit {
		return n
	}
	return limit
}
