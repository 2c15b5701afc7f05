package guestconn

import (
	"context"
	"net"
	"net/http"
	"time"
)

// Guest is a connection to one guest agent. It reconnects by itself for as
// long as its VM lives. Safe for concurrent use.
type Guest interface {
	Agent
	Runtime
	Cluster
	Dialer
	// Exec runs a command to its end and collects its output.
	Exec(ctx context.Context, e Exec) (Result, error)
	// Memory tells how much memory the guest uses and has, in bytes.
	Memory(ctx context.Context) (used, total uint64, err error)
	// Trim has the guest give back the blocks that its filesystems do not use.
	Trim(ctx context.Context) (Trimmed, error)
	// WatchPorts has the guest tell each which of its ports are published: all of
	// now, and what changes. It returns when ctx ends, when each fails, or when
	// the guest is lost. An agent that can't is fault.Denied. A guest without
	// Docker and Kubernetes says nothing, and nothing is sent.
	WatchPorts(ctx context.Context, each func(PortEvent) error) error
}

// Agent is what hutchd has a guest agent do for the life of its machine.
type Agent interface {
	// Ready waits until the link is up and the agent has said hello.
	Ready(ctx context.Context) (Hello, error)
	// Configure gives the guest who and where it is.
	Configure(ctx context.Context, c Config) (Facts, error)
	// Quiesce holds the guest still, until Configure has succeeded the next time,
	// to be copied. When it fails, the guest goes on as before.
	Quiesce(ctx context.Context) (Quiesced, error)
	// SyncClock sends the host's time.
	SyncClock(ctx context.Context) error
	// Shutdown asks the guest to end its processes within grace and power off.
	// It returns when the guest has acknowledged.
	Shutdown(ctx context.Context, grace time.Duration) error
	// Close ends the connection and waits for its goroutines.
	Close() error
}

// Dialer reaches what is served in a guest.
type Dialer interface {
	// Transport carries HTTP/2 requests to the guest's APIs. It never dials
	// anything else.
	Transport() http.RoundTripper
	// DialPort opens a TCP connection to a port of the guest, as from inside
	// it: its loopback first, then its own address.
	DialPort(ctx context.Context, port uint16) (net.Conn, error)
	// DialDocker opens a connection to the socket of the guest's dockerd, with
	// the manners of a Unix socket: it has CloseWrite, and what the daemon wrote
	// before it closed arrives whole.
	DialDocker(ctx context.Context) (net.Conn, error)
	// DialUDP opens a flow to a UDP port of the guest. Each Read of it returns one
	// datagram, each Write is one and never waits: what there is no room for is
	// lost, which is no error, as it is none that nobody listens. Closing it ends
	// the flow in the guest; a Read that fails says that it has ended there.
	DialUDP(ctx context.Context, port uint16) (net.Conn, error)
}

// Trimmed is what a Trim gave back.
type Trimmed struct {
	Bytes  uint64
	Detail string // by filesystem, in the guest's words
}

// Hello is what the guest agent says of itself when the link comes up.
type Hello struct {
	AgentVersion string
	Features     []string
}

// Config is who and where a guest is.
type Config struct {
	ID          string
	MachineID   string // 32 hex digits
	Address     string // with prefix length; empty: no network
	Gateway     string
	DNS         []string
	MTU         int
	Env         map[string]string
	DefaultUser string
	DefaultCwd  string
	// BootID makes the guest a copy: a fresh lower-case UUID that its boot is
	// known by from now on. Empty: it is who it was, which includes the original
	// after a Quiesce, and one that comes back from a disk.
	BootID string
	// Shares are mounted before Configure returns.
	Shares []Share
	// TestFeatures turns on what only tests need.
	TestFeatures bool
}

// Share is a filesystem of the host's that a guest mounts.
type Share struct {
	Tag      string // of the device
	Path     string // where
	ReadOnly bool
}

// Quiesced is how a Quiesce went.
type Quiesced struct {
	// Flush is how long the data disk was written back while programs ran,
	// Freeze how long it took to stop them, and Sync how long the rest of the
	// writing took.
	Flush, Freeze, Sync time.Duration
	// Frozen names the cgroups that were frozen, of those at the top.
	Frozen []string
}

// Facts is what a configured guest tells of itself.
type Facts struct {
	AgentVersion  string
	KernelVersion string
	BootID        string
	Warnings      []string
	// ShareErrors are why shares are not mounted.
	ShareErrors []string
}

// Exec is one command to run.
type Exec struct {
	Cmd     string
	Args    []string
	Env     map[string]string
	Cwd     string
	User    string
	Stdin   []byte
	Timeout time.Duration // 0: none
	// MaxOutput caps each stream of the result, in bytes. What comes after is
	// read and dropped.
	MaxOutput int
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr                   []byte
	StdoutTruncated, StderrTruncated bool
	ExitCode                         int    // 128+n when signal n ended it
	Signal                           string // "SIGKILL"; empty when none
	TimedOut                         bool
	OOMKilled                        bool
}
