package kubernetes

import (
	"fmt"
	"strings"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// Status is how the cluster is.
type Status struct {
	// Running: somebody wants it. Its program runs, or will as soon as it can.
	Running   bool
	APIReady  bool
	NodeReady bool // pods run
	Endpoint  string
	Detail    string
	// Services are what the distribution needs, the unit, and the components.
	Services []Service
}

// Status returns how the cluster is now, or was a moment ago where it answers
// slowly. It takes no turn of anybody's and less than a second.
func (c *Cluster) Status() Status {
	s := Status{Endpoint: Endpoint}
	d, err := c.distribution()
	if err != nil {
		s.Detail = err.Error()
		return s
	}
	s.Endpoint = d.API.URL
	unit, _ := c.p.Units.Status(UnitName)
	v := view{components: unknown(d)}
	if unit.PID != 0 {
		v = c.current(d).watcher.latest(c.ctx, lookPatience)
		if v.components == nil {
			v.components = unknown(d)
		}
	}
	s.Running = unit.State != supervise.Stopped
	c.mu.Lock()
	turn, warned := c.turn, c.warned
	c.mu.Unlock()
	s.APIReady, s.NodeReady = v.apiReady, v.nodeReady && unit.State == supervise.Ready && turn == nil
	for _, need := range d.Needs {
		st, _ := c.p.Units.Status(need)
		s.Services = append(s.Services, serviceOf(need, st))
	}
	s.Services = append(s.Services, serviceOf(UnitName, unit))
	s.Services = append(s.Services, v.components...)
	if turn != nil {
		s.Detail = fmt.Sprintf("%s is being %s: %s", d.Name, turn.kind, turn.step())
	} else {
		s.Detail = c.detail(d, unit, v, warned)
	}
	return s
}

func serviceOf(name string, st supervise.Status) Service {
	return Service{Name: name, State: st.Word(), Detail: st.Detail(), Crashes: st.Crashes}
}

// detail says in one line how far the cluster is and what it waits for.
func (c *Cluster) detail(d Distribution, unit supervise.Status, v view, warned []string) string {
	var parts []string
	switch {
	case unit.State == supervise.Stopped:
		parts = append(parts, d.Name+" is not running")
	case unit.State == supervise.Waiting:
		parts = append(parts, "starting: "+unit.Detail())
		for _, need := range d.Needs {
			st, _ := c.p.Units.Status(need)
			parts = append(parts, need+": "+st.Detail())
		}
	case unit.State != supervise.Ready:
		parts = append(parts, d.Name+": "+unit.Detail())
	case v.nodeReady:
		parts = append(parts, "Kubernetes is ready")
	case !v.apiReady:
		parts = append(parts, d.Name+" runs; "+v.why)
	default:
		parts = append(parts, "the API is ready; "+v.why)
	}
	if unit.State != supervise.Stopped && !v.nodeReady {
		parts = append(parts, warned...)
	}
	return strings.Join(parts, "; ")
}
