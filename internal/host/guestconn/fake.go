package guestconn

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
)

// Fake is a Guest for tests. The zero value is a guest that is ready at once,
// does what it is told, and runs every command to a clean end without output.
// Set its fields before first use; they are called from many goroutines.
type Fake struct {
	// Released, when not nil, is closed to let Ready return.
	Released <-chan struct{}
	// Says is what Ready returns.
	Says Hello
	// Facts is what Configure returns.
	Facts Facts
	// Quiesced is what Quiesce returns.
	Quiesced Quiesced
	// Err, when not nil, is asked before every call but Close; what it returns
	// is the call's error. call is the method's name.
	Err func(call string) error
	// OnExec, when not nil, runs the commands.
	OnExec func(ctx context.Context, e Exec) (Result, error)
	// OnShutdown, when not nil, is called by Shutdown.
	OnShutdown func(ctx context.Context, grace time.Duration) error
	// OnRoundTrip, when not nil, answers requests to Transport.
	OnRoundTrip func(r *http.Request) (*http.Response, error)
	// OnDialPort, when not nil, makes the connections of DialPort.
	OnDialPort func(ctx context.Context, port uint16) (net.Conn, error)
	// Trimmed is what Trim returns.
	Trimmed Trimmed
	// OnDialDocker and OnDialUDP are the same for DialDocker and DialUDP.
	OnDialDocker func(ctx context.Context) (net.Conn, error)
	OnDialUDP    func(ctx context.Context, port uint16) (net.Conn, error)
	// OnWatchPorts, when not nil, is WatchPorts. Else nothing is published.
	OnWatchPorts func(ctx context.Context, each func(PortEvent) error) error
	// Used and Total are what Memory returns.
	Used, Total uint64
	// OnEnsureRuntime, when not nil, answers EnsureRuntime; else Docker was up
	// before.
	OnEnsureRuntime func(ctx context.Context, start bool) (Ensured, error)
	// RuntimeIs and ClusterIs are what the guest says of Docker and Kubernetes.
	RuntimeIs RuntimeStatus
	ClusterIs ClusterStatus

	mu      sync.Mutex
	calls   []string
	configs []Config
	execs   []Exec
	closed  bool
}

var _ Guest = (*Fake)(nil)

// Calls returns the names of the methods called so far, in order.
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

// Configs returns what Configure was given so far.
func (f *Fake) Configs() []Config {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Config(nil), f.configs...)
}

// Execs returns what Exec was given so far.
func (f *Fake) Execs() []Exec {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Exec(nil), f.execs...)
}

// Closed tells whether Close was called.
func (f *Fake) Closed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

// enter records a call and returns its error, if it has one.
func (f *Fake) enter(ctx context.Context, call string) error {
	f.mu.Lock()
	f.calls = append(f.calls, call)
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return fault.New(fault.Unavailable, "connection to guest is closed")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if f.Err != nil {
		return f.Err(call)
	}
	return nil
}

// Ready implements Guest.
func (f *Fake) Ready(ctx context.Context) (Hello, error) {
	if err := f.enter(ctx, "Ready"); err != nil {
		return Hello{}, err
	}
	if f.Released != nil {
		select {
		case <-f.Released:
		case <-ctx.Done():
			return Hello{}, waitError(ctx, nil)
		}
	}
	return f.Says, nil
}

// Configure implements Guest.
func (f *Fake) Configure(ctx context.Context, c Config) (Facts, error) {
	if err := f.enter(ctx, "Configure"); err != nil {
		return Facts{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.configs = append(f.configs, c)
	return f.Facts, nil
}

// Quiesce implements Guest.
func (f *Fake) Quiesce(ctx context.Context) (Quiesced, error) {
	if err := f.enter(ctx, "Quiesce"); err != nil {
		return Quiesced{}, err
	}
	return f.Quiesced, nil
}

// SyncClock implements Guest.
func (f *Fake) SyncClock(ctx context.Context) error { return f.enter(ctx, "SyncClock") }

// Trim implements Guest.
func (f *Fake) Trim(ctx context.Context) (Trimmed, error) {
	return f.Trimmed, f.enter(ctx, "Trim")
}

// Shutdown implements Guest.
func (f *Fake) Shutdown(ctx context.Context, grace time.Duration) error {
	err := f.enter(ctx, "Shutdown")
	if err == nil && f.OnShutdown != nil {
		err = f.OnShutdown(ctx, grace)
	}
	return err
}

// Exec implements Guest.
func (f *Fake) Exec(ctx context.Context, e Exec) (Result, error) {
	if err := f.enter(ctx, "Exec"); err != nil {
		return Result{}, err
	}
	f.mu.Lock()
	f.execs = append(f.execs, e)
	f.mu.Unlock()
	if f.OnExec == nil {
		return Result{}, nil
	}
	return f.OnExec(ctx, e)
}

// Memory implements Guest.
func (f *Fake) Memory(ctx context.Context) (used, total uint64, err error) {
	if err := f.enter(ctx, "Memory"); err != nil {
		return 0, 0, err
	}
	return f.Used, f.Total, nil
}

// EnsureRuntime implements Guest.
func (f *Fake) EnsureRuntime(ctx context.Context, start bool) (Ensured, error) {
	if err := f.enter(ctx, "EnsureRuntime"); err != nil {
		return Ensured{}, err
	}
	if f.OnEnsureRuntime == nil {
		return Ensured{Ready: true, Status: EnsureReused}, nil
	}
	return f.OnEnsureRuntime(ctx, start)
}

// RuntimeStatus implements Guest.
func (f *Fake) RuntimeStatus(ctx context.Context) (RuntimeStatus, error) {
	return f.RuntimeIs, f.enter(ctx, "RuntimeStatus")
}

// StartKubernetes implements Guest.
func (f *Fake) StartKubernetes(ctx context.Context) (ClusterStatus, error) {
	return f.ClusterIs, f.enter(ctx, "StartKubernetes")
}

// KubernetesStatus implements Guest.
func (f *Fake) KubernetesStatus(ctx context.Context) (ClusterStatus, error) {
	return f.ClusterIs, f.enter(ctx, "KubernetesStatus")
}

// Transport implements Guest.
func (f *Fake) Transport() http.RoundTripper { return fakeTransport{f} }

type fakeTransport struct{ f *Fake }

// RoundTrip answers with OnRoundTrip, or 404.
func (t fakeTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := t.f.enter(r.Context(), "RoundTrip"); err != nil {
		return nil, err
	}
	if t.f.OnRoundTrip != nil {
		return t.f.OnRoundTrip(r)
	}
	return &http.Response{
		Status: "404 Not Found", StatusCode: http.StatusNotFound, Proto: "HTTP/2.0", ProtoMajor: 2,
		Header: http.Header{}, Body: http.NoBody, Request: r,
	}, nil
}

// DialPort implements Guest.
func (f *Fake) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	if err := f.enter(ctx, "DialPort"); err != nil {
		return nil, err
	}
	if f.OnDialPort == nil {
		return nil, fault.New(fault.Unavailable, "port %d of guest: nothing listens", port)
	}
	return f.OnDialPort(ctx, port)
}

// DialDocker implements Guest.
func (f *Fake) DialDocker(ctx context.Context) (net.Conn, error) {
	if err := f.enter(ctx, "DialDocker"); err != nil {
		return nil, err
	}
	if f.OnDialDocker == nil {
		return nil, fault.New(fault.Unavailable, "Docker of guest: nothing listens")
	}
	return f.OnDialDocker(ctx)
}

// DialUDP implements Guest.
func (f *Fake) DialUDP(ctx context.Context, port uint16) (net.Conn, error) {
	if err := f.enter(ctx, "DialUDP"); err != nil {
		return nil, err
	}
	if f.OnDialUDP == nil {
		return nil, fault.New(fault.Unavailable, "UDP port %d of guest: there is none", port)
	}
	return f.OnDialUDP(ctx, port)
}

// WatchPorts implements Guest.
func (f *Fake) WatchPorts(ctx context.Context, each func(PortEvent) error) error {
	if err := f.enter(ctx, "WatchPorts"); err != nil {
		return err
	}
	if f.OnWatchPorts != nil {
		return f.OnWatchPorts(ctx, each)
	}
	<-ctx.Done()
	return ctx.Err()
}

// Close implements Guest.
func (f *Fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "Close")
	f.closed = true
	return nil
}
