package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// Service is the state of one part of the runtime.
type Service struct {
	Name    string
	Status  string // a word of package supervise
	Detail  string
	Crashes uint32
}

// Report is what of the runtime is up.
type Report struct {
	Containerd, Docker bool
	Detail             string
	Services           []Service // containerd, dockerd, runc
}

// Status looks at the runtime. It waits for no start: every question is
// bounded, and they are asked side by side.
func (r *Runtime) Status(ctx context.Context) Report {
	if err := r.define(); err != nil {
		return Report{Detail: err.Error()}
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	var containerd, dockerd Service
	var asking sync.WaitGroup
	asking.Go(func() { containerd = r.containerdService(ctx) })
	asking.Go(func() { dockerd = r.dockerdService(ctx) })
	asking.Wait()
	rep := Report{
		Containerd: containerd.Status == supervise.WordReady, Docker: dockerd.Status == supervise.WordReady,
		Services: []Service{containerd, dockerd, r.runcService()},
	}
	rep.Detail = "docker socket ready"
	if !rep.Docker {
		rep.Detail = r.socketState()
		if missing := r.missing(); missing != "" {
			rep.Detail += "; " + missing
		}
	}
	return rep
}

// socketState says in what state Docker's socket is that nobody serves.
func (r *Runtime) socketState() string {
	path := r.docker.socket
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return "docker socket missing: " + path
	}
	return "docker socket exists but not reachable: " + path
}

func (r *Runtime) containerdService(ctx context.Context) Service {
	st, _ := r.sup.Status(Containerd)
	path := r.health.socket
	err := r.health.check(ctx)
	if err == nil {
		return service(st, supervise.WordReady, "socket reachable: "+path)
	}
	word, found := reach(path)
	switch {
	case found == missing:
		return service(st, word, "no reachable socket found; checked: "+path)
	case found == deaf:
		return service(st, word, "socket exists but not connectable: "+path)
	}
	return service(st, word, fmt.Sprintf("socket connectable, API initializing: %s (%v)", path, err))
}

func (r *Runtime) dockerdService(ctx context.Context) Service {
	st, _ := r.sup.Status(Dockerd)
	path := r.docker.socket
	if err := r.docker.ping(ctx); err == nil {
		text := "API /_ping OK: " + path
		if info, err := r.docker.info(ctx); err == nil {
			text += "; " + info.String()
			if err := info.connected(); err != nil {
				return service(st, supervise.WordNotReady, err.Error())
			}
		}
		return service(st, supervise.WordReady, text)
	}
	word, found := reach(path)
	switch found {
	case missing:
		return service(st, word, "socket missing: "+path)
	case deaf:
		return service(st, word, "socket exists but not connectable: "+path)
	}
	return service(st, word, "socket connectable, API initializing: "+path)
}

func (r *Runtime) runcService() Service {
	path, err := supervise.Find(r.p.path, runc)
	if err != nil {
		return Service{Name: runc, Status: supervise.WordError, Detail: err.Error()}
	}
	return Service{Name: runc, Status: supervise.WordReady, Detail: "found: " + path}
}

// service puts what the daemon says beside what became of its process.
func service(st supervise.Status, word, said string) Service {
	s := Service{Name: st.Name, Status: word, Detail: said, Crashes: st.Crashes}
	if st.State == supervise.Failed {
		s.Status = supervise.WordError
	}
	if s.Status != supervise.WordReady && st.State != supervise.Stopped {
		s.Detail += "; " + string(st.State)
		if st.State == supervise.Waiting || st.State == supervise.Failed {
			s.Detail += " " + st.Said
		}
	}
	if h := st.History(); h != "" {
		s.Detail += "; " + h
	}
	return s
}

// What is found at a socket whose daemon does not answer.
const (
	missing = "missing"
	deaf    = "deaf" // nobody takes connections
	mute    = "mute" // somebody does
)

// reach looks at a socket whose daemon did not answer, and returns the word for
// that and what it found.
func reach(path string) (word, found string) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return supervise.WordNotReady, missing
	}
	c, err := net.DialTimeout("unix", path, 300*time.Millisecond)
	if err != nil {
		return supervise.WordError, deaf
	}
	_ = c.Close()
	return supervise.WordNotReady, mute
}
