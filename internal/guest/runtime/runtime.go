package runtime

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// Names of the units, and of runc, which is none but has a status.
const (
	Containerd = "containerd"
	Dockerd    = "dockerd"
	runc       = "runc"
)

// Where the daemons listen.
const (
	DockerSocket     = "/run/docker.sock"
	ContainerdSocket = "/run/containerd/containerd.sock"
	// Endpoint is the Docker API as a program in the guest reaches it.
	Endpoint = "unix://" + DockerSocket
)

// Params is what a Runtime is made of. The first two are needed.
type Params struct {
	Supervisor *supervise.Supervisor
	Log        *slog.Logger
	// Env returns the environment of the sandbox's commands. What it says of
	// proxies counts for the daemons too. Nil: nothing.
	Env func() map[string]string
	// Started is told when dockerd was asked for, or was taken over from a server
	// before; more than once too. It must not wait. Nil: nobody is told.
	Started func()

	// Tests only.
	root    string                      // instead of "/"; empty in a guest
	path    string                      // where programs are; empty: supervise.Path
	kernel  func(context.Context) error // instead of preparing it
	patient time.Duration               // instead of startLimit and of silenceLimit
}

const (
	// startLimit is how long a start may take before it is called a failure. The
	// daemons are left to go on all the same.
	startLimit = 10 * time.Minute
	// silenceLimit is the same for a dockerd that runs, was ready, and does not
	// answer: it may only be busy, or have just been thawed.
	silenceLimit = time.Minute
	// probeLimit bounds one question to a daemon.
	probeLimit = 2 * time.Second
	// fresh is how long an answer of dockerd counts.
	fresh = 500 * time.Millisecond
)

// Runtime is Docker in this guest. All methods are safe for concurrent use.
type Runtime struct {
	p       Params
	sup     *supervise.Supervisor
	define  func() error // once
	docker  *dockerAPI
	health  *healthAPI
	probing turn

	checked   time.Time // of the last answer; of the holder of the turn
	checkedOf daemons   // that gave it

	mu        sync.Mutex
	announce  bool      // a start was asked for that nobody was told the end of
	silent    time.Time // since when dockerd runs and does not answer; zero: it does
	connected daemons   // that were seen with one another last
}

// daemons are the pids of both.
type daemons struct{ containerd, dockerd int }

// New returns a Runtime. It starts nothing and touches nothing.
func New(p Params) *Runtime {
	p.path = cmp.Or(p.path, supervise.Path)
	if p.kernel == nil {
		p.kernel = prepareKernel
	}
	r := &Runtime{p: p, sup: p.Supervisor, probing: make(turn, 1)}
	r.docker = newDockerAPI(r.at(DockerSocket))
	r.health = newHealthAPI(r.at(ContainerdSocket))
	r.define = sync.OnceValue(r.defineUnits)
	return r
}

func (r *Runtime) at(path string) string { return filepath.Join(r.p.root, path) }

// Define makes the units known to the supervisor. The first other call does it
// too; a server that follows a crashed one must do it at its start.
func (r *Runtime) Define() error { return r.define() }

func (r *Runtime) defineUnits() error {
	for _, u := range []supervise.Unit{r.containerdUnit(), r.dockerdUnit()} {
		if err := r.sup.Define(u); err != nil {
			return err
		}
	}
	if st, _ := r.sup.Status(Dockerd); st.State != supervise.Stopped {
		r.tell()
	}
	return nil
}

// tell tells that dockerd runs, or will.
func (r *Runtime) tell() {
	if r.p.Started != nil {
		r.p.Started()
	}
}

// Left reports whether an earlier server of this boot left a unit of the
// runtime wanted.
func (r *Runtime) Left() bool { return r.sup.Left(Containerd) || r.sup.Left(Dockerd) }

// Words of a RuntimeEnsureResponse of arcbox.v1.
const (
	StatusStarting = "starting"
	StatusStarted  = "started"
	StatusReused   = "reused"
	StatusFailed   = "failed"
)

// Ensured is the answer to Ensure.
type Ensured struct {
	Ready    bool
	Endpoint string // empty unless Ready
	Message  string
	Status   string // one of the constants
}

func ready(status, message string) Ensured {
	return Ensured{Ready: true, Endpoint: Endpoint, Message: message, Status: status}
}

// Ensure says whether dockerd serves, and with start begins to start it when it
// does not. It does not wait for that: the first call after the start's end is
// told that it was started, all others that it is reused.
func (r *Runtime) Ensure(ctx context.Context, start bool) Ensured {
	if err := r.define(); err != nil {
		return Ensured{Status: StatusFailed, Message: err.Error()}
	}
	st, _ := r.sup.Status(Dockerd)
	if r.mayServe(st) {
		said, err := r.check(ctx, r.daemons())
		switch {
		case err == nil:
			return ready(r.greet(), said)
		case st.State == supervise.Ready:
			return r.silence(err)
		}
	}
	if st.State == supervise.Stopped {
		if missing := r.missing(); missing != "" {
			return Ensured{Status: StatusFailed, Message: missing}
		}
		if !start {
			return Ensured{Status: StatusFailed, Message: "dockerd does not run: " + r.socketState()}
		}
		if err := r.begin(); err != nil {
			return Ensured{Status: StatusFailed, Message: err.Error()}
		}
		r.tell()
	}
	return r.progress()
}

// mayServe reports whether it is worth while to ask dockerd: one that is just
// being started is asked by the supervisor, and one that nobody supervises may
// have been started by somebody else.
func (r *Runtime) mayServe(st supervise.Status) bool {
	return st.State == supervise.Ready || st.State == supervise.Stopped
}

func (r *Runtime) begin() error {
	if err := r.sup.Start(Dockerd); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.announce = true
	return nil
}

// silence tells of a dockerd that runs and did not answer just now.
func (r *Runtime) silence(err error) Ensured {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.silent.IsZero() {
		r.silent = time.Now()
	}
	e := Ensured{Status: StatusStarting, Message: "dockerd runs and does not answer: " + err.Error()}
	if time.Since(r.silent) > cmp.Or(r.p.patient, silenceLimit) {
		e.Status = StatusFailed
	}
	return e
}

// greet returns what the caller is told of a runtime that serves.
func (r *Runtime) greet() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.silent = time.Time{}
	if r.announce {
		r.announce = false
		return StatusStarted
	}
	return StatusReused
}

// progress tells of a start that is under way, or that goes wrong.
func (r *Runtime) progress() Ensured {
	below, _ := r.sup.Status(Containerd)
	st, _ := r.sup.Status(Dockerd)
	message := "runtime start in progress: containerd " + below.Detail() + "; dockerd " + st.Detail()
	switch {
	case st.State == supervise.Failed || below.State == supervise.Failed:
		if missing := r.missing(); missing != "" {
			message = missing + "; " + message
		}
	case st.State == supervise.Stopping, r.late(st) && r.late(below):
	default:
		return Ensured{Status: StatusStarting, Message: message}
	}
	return Ensured{Status: StatusFailed, Message: message}
}

// late reports whether a unit is in its state for too long to go on waiting.
func (r *Runtime) late(st supervise.Status) bool {
	return time.Since(st.Since) > cmp.Or(r.p.patient, startLimit)
}

// check asks dockerd, unless it has answered a moment ago. Those who want to
// know at the same time ask once. Of a containerd that dockerd was not seen with
// yet it is asked too, which takes longer.
func (r *Runtime) check(ctx context.Context, of daemons) (said string, err error) {
	said = "API /_ping OK: " + r.docker.socket
	if err := r.probing.take(ctx); err != nil {
		return "", err
	}
	defer r.probing.give()
	if of.dockerd != 0 && of == r.checkedOf && time.Since(r.checked) < fresh {
		if _, found := reach(r.docker.socket); found == mute { // of one that has just died it is none
			return said, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	if err := r.docker.ping(ctx); err != nil {
		return "", err
	}
	if err := r.checkConnected(ctx, of); err != nil {
		return "", err
	}
	r.checked, r.checkedOf = time.Now(), of
	return said, nil
}

// daemons returns those that run now.
func (r *Runtime) daemons() daemons {
	below, _ := r.sup.Status(Containerd)
	st, _ := r.sup.Status(Dockerd)
	return daemons{below.PID, st.PID}
}

// checkConnected asks dockerd whether it has its containerd, once for each two
// of them: /info runs programs.
func (r *Runtime) checkConnected(ctx context.Context, of daemons) error {
	r.mu.Lock()
	known := of.dockerd == 0 || of == r.connected
	r.mu.Unlock()
	if known {
		return nil
	}
	info, err := r.docker.info(ctx)
	if err := cmp.Or(err, info.connected()); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.connected = of
	return nil
}

// missing names the programs that the image lacks, or is empty.
func (r *Runtime) missing() string {
	var lacking []string
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc", "dockerd", "iptables"} {
		if _, err := supervise.Find(r.p.path, name); err != nil {
			lacking = append(lacking, name)
		}
	}
	if len(lacking) == 0 {
		return ""
	}
	return fmt.Sprintf("missing runtime binaries under %s: %s", r.p.path, strings.Join(lacking, ", "))
}

// turn is a lock that can be waited for within a context.
type turn chan struct{}

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turn) give() { <-t }
