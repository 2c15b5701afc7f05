package guestconn

import (
	"context"
	"slices"

	"connectrpc.com/connect"

	arcboxv1 "github.com/hutch-run/hutch/gen/arcbox/v1"
	"github.com/hutch-run/hutch/internal/fault"
)

// Runtime is Docker in a guest. An agent that can't have it is
// fault.Unimplemented.
type Runtime interface {
	// EnsureRuntime asks for containerd and dockerd; without start it only looks.
	// It answers at once. That they can't be started is no error, but an answer
	// with the status EnsureFailed.
	EnsureRuntime(ctx context.Context, start bool) (Ensured, error)
	// RuntimeStatus tells what of it is up. It never waits for a start.
	RuntimeStatus(ctx context.Context) (RuntimeStatus, error)
}

// Cluster is Kubernetes in a guest. An agent that can't have it is
// fault.Unimplemented.
type Cluster interface {
	// StartKubernetes asks for the cluster. It answers at once.
	StartKubernetes(ctx context.Context) (ClusterStatus, error)
	// KubernetesStatus tells what of it is up. It never waits for a start.
	KubernetesStatus(ctx context.Context) (ClusterStatus, error)
}

// EnsureStatus is what an EnsureRuntime found or did.
type EnsureStatus string

// The statuses.
const (
	EnsureStarting EnsureStatus = "starting" // on its way
	EnsureStarted  EnsureStatus = "started"  // up, since this start
	EnsureReused   EnsureStatus = "reused"   // up, since before
	EnsureFailed   EnsureStatus = "failed"   // not up, and not on its way
)

// Ensured is the answer of EnsureRuntime.
type Ensured struct {
	Ready    bool // the Docker API answers
	Status   EnsureStatus
	Endpoint string // as seen in the guest
	Message  string // for people
}

// RuntimeStatus is what of Docker is up in a guest.
type RuntimeStatus struct {
	Containerd, Docker bool
	Endpoint           string // as seen in the guest
	Detail             string // for people
	Services           []Service
}

// ClusterStatus is what of Kubernetes is up in a guest.
type ClusterStatus struct {
	Running   bool // its processes run
	APIReady  bool // /readyz answers
	NodeReady bool // pods run
	Endpoint  string
	Detail    string // for people
	Services  []Service
}

// Service is one that a guest agent looks after.
type Service struct {
	Name    string
	Status  string // "ready", "not_ready" or "error"
	Detail  string // for people
	Crashes uint32 // how often it ended without being asked to
}

// EnsureRuntime implements Runtime.
func (c *Conn) EnsureRuntime(ctx context.Context, start bool) (Ensured, error) {
	if _, err := c.session(ctx); err != nil {
		return Ensured{}, err
	}
	const what = "ask guest for Docker"
	res, err := c.agent.EnsureRuntime(ctx, connect.NewRequest(&arcboxv1.RuntimeEnsureRequest{StartIfNeeded: start}))
	if err != nil {
		return Ensured{}, callError(what, err)
	}
	m := res.Msg
	e := Ensured{Ready: m.GetReady(), Status: EnsureStatus(m.GetStatus()), Endpoint: text(m.GetEndpoint()), Message: text(m.GetMessage())}
	if !slices.Contains([]EnsureStatus{EnsureStarting, EnsureStarted, EnsureReused, EnsureFailed}, e.Status) {
		return Ensured{}, fault.New(fault.Internal, "%s: its agent answered %q", what, text(m.GetStatus()))
	}
	return e, nil
}

// RuntimeStatus implements Runtime.
func (c *Conn) RuntimeStatus(ctx context.Context) (RuntimeStatus, error) {
	if _, err := c.session(ctx); err != nil {
		return RuntimeStatus{}, err
	}
	res, err := c.agent.GetRuntimeStatus(ctx, connect.NewRequest(&arcboxv1.RuntimeStatusRequest{}))
	if err != nil {
		return RuntimeStatus{}, callError("ask guest about Docker", err)
	}
	m := res.Msg
	return RuntimeStatus{
		Containerd: m.GetContainerdReady(), Docker: m.GetDockerReady(),
		Endpoint: text(m.GetEndpoint()), Detail: text(m.GetDetail()), Services: services(m.GetServices()),
	}, nil
}

// StartKubernetes implements Cluster.
func (c *Conn) StartKubernetes(ctx context.Context) (ClusterStatus, error) {
	if _, err := c.session(ctx); err != nil {
		return ClusterStatus{}, err
	}
	res, err := c.agent.StartKubernetes(ctx, connect.NewRequest(&arcboxv1.KubernetesStartRequest{}))
	if err != nil {
		return ClusterStatus{}, callError("ask guest for Kubernetes", err)
	}
	m := res.Msg
	return ClusterStatus{Running: m.GetRunning(), APIReady: m.GetApiReady(), Endpoint: text(m.GetEndpoint()), Detail: text(m.GetDetail())}, nil
}

// KubernetesStatus implements Cluster.
func (c *Conn) KubernetesStatus(ctx context.Context) (ClusterStatus, error) {
	if _, err := c.session(ctx); err != nil {
		return ClusterStatus{}, err
	}
	res, err := c.agent.GetKubernetesStatus(ctx, connect.NewRequest(&arcboxv1.KubernetesStatusRequest{}))
	if err != nil {
		return ClusterStatus{}, callError("ask guest about Kubernetes", err)
	}
	m := res.Msg
	return ClusterStatus{
		Running: m.GetRunning(), APIReady: m.GetApiReady(), NodeReady: m.GetNodeReady(),
		Endpoint: text(m.GetEndpoint()), Detail: text(m.GetDetail()), Services: services(m.GetServices()),
	}, nil
}

// services is what a guest says of the first few of its services.
func services(list []*arcboxv1.ServiceStatus) []Service {
	var out []Service
	for _, s := range list[:min(len(list), maxTexts)] {
		out = append(out, Service{Name: text(s.GetName()), Status: text(s.GetStatus()), Detail: text(s.GetDetail()), Crashes: s.GetCrashes()})
	}
	return out
}
