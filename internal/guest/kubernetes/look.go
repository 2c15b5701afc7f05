package kubernetes

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// Service is the state of one part of a cluster.
type Service struct {
	Name    string
	State   string // "ready", "not_ready" or "error"
	Detail  string
	Crashes uint32
}

// view is how a cluster was when it was last looked at.
type view struct {
	apiReady   bool
	nodeReady  bool
	why        string // what is missing first; empty: nothing
	components []Service
}

// lookLimit bounds one look. Nobody waits that long, see watcher.latest.
const lookLimit = 10 * time.Second

// observer asks one life of a distribution how it is.
type observer struct {
	d       Distribution
	connect func() (*API, error)
	open    *http.Client // without certificates
}

func newObserver(d Distribution, connect func() (*API, error)) *observer {
	return &observer{d: d, connect: connect, open: &http.Client{Transport: &http.Transport{
		// Some make their certificate themselves. Who could pretend to be one
		// in here is root already.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, IdleConnTimeout: time.Minute,
	}}}
}

func (o *observer) close() { o.open.CloseIdleConnections() }

// look asks everything once.
func (o *observer) look(ctx context.Context) view {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	var v view
	api, err := o.connect()
	if err != nil {
		v.why = "waiting for the API: " + shorten(err.Error())
		v.components = unknown(o.d)
		return v
	}
	var parts sync.WaitGroup
	parts.Go(func() { v.components = o.lookComponents(ctx, api) })
	err = api.call(ctx, o.d.API.Readyz, nil)
	v.apiReady = err == nil
	var node error
	if v.apiReady {
		node = o.lookNode(ctx, api)
	}
	parts.Wait()
	switch down := notReady(v.components); {
	case err != nil:
		v.why = "waiting for the API: " + shorten(err.Error())
	case node != nil:
		v.why = "waiting for " + shorten(node.Error())
	case down != nil:
		v.why = fmt.Sprintf("waiting for %s: %s", down.Name, down.Detail)
	default:
		v.nodeReady = true
	}
	return v
}

func notReady(all []Service) *Service {
	for i := range all {
		if all[i].State != supervise.WordReady {
			return &all[i]
		}
	}
	return nil
}

// unknown is what is told of components that nobody can ask.
func unknown(d Distribution) []Service {
	var all []Service
	for _, c := range d.Components {
		all = append(all, Service{Name: c.Name, State: supervise.WordNotReady})
	}
	return all
}

// lookComponents asks all side by side.
func (o *observer) lookComponents(ctx context.Context, api *API) []Service {
	all := unknown(o.d)
	var asked sync.WaitGroup
	for i, c := range o.d.Components {
		asked.Go(func() {
			if err := o.lookComponent(ctx, api, c); err != nil {
				all[i].Detail = shorten(err.Error())
				return
			}
			all[i].State = supervise.WordReady
		})
	}
	asked.Wait()
	return all
}

func (o *observer) lookComponent(ctx context.Context, api *API, c Component) error {
	if api.has(c.URL) {
		u, err := url.Parse(c.URL)
		if err != nil {
			return err
		}
		return api.call(ctx, u.RequestURI(), nil)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return err
	}
	client := http.DefaultClient
	if c.Insecure {
		client = o.open
	}
	res, err := client.Do(r)
	if err != nil {
		return plain(err)
	}
	return readAnswer(res, nil)
}

// lookNode finds out whether pods can run; the error says what is missing.
func (o *observer) lookNode(ctx context.Context, api *API) error {
	if err := o.lookCondition(ctx, api); err != nil {
		return err
	}
	// Without it no pod is admitted.
	if err := api.call(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil); err != nil {
		return fmt.Errorf("the default ServiceAccount: %w", err)
	}
	for _, name := range o.d.Ready.Deployments {
		if err := lookDeployment(ctx, api, name); err != nil {
			return fmt.Errorf("deployment %s: %w", name, err)
		}
	}
	if o.d.Ready.DNS == nil {
		return nil
	}
	if err := o.d.Ready.DNS.ask(ctx); err != nil {
		return fmt.Errorf("the DNS of the cluster: %w", err)
	}
	return nil
}

func lookDeployment(ctx context.Context, api *API, name string) error {
	var deployment struct {
		Status struct {
			AvailableReplicas int `json:"availableReplicas"`
		}
	}
	namespace, name, _ := strings.Cut(name, "/")
	path := "/apis/apps/v1/namespaces/" + url.PathEscape(namespace) + "/deployments/" + url.PathEscape(name)
	if err := api.call(ctx, path, &deployment); err != nil {
		return err
	}
	if deployment.Status.AvailableReplicas == 0 {
		return errors.New("no pod of it serves")
	}
	return nil
}

func (o *observer) lookCondition(ctx context.Context, api *API) error {
	var node struct {
		Spec struct {
			Taints []struct{ Key, Effect string }
		}
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	name := o.d.Ready.Node
	if err := api.call(ctx, "/api/v1/nodes/"+url.PathEscape(name), &node); err != nil {
		return fmt.Errorf("node %s: %w", name, err)
	}
	ready, why := false, "it has said nothing yet"
	for _, c := range node.Status.Conditions {
		if c.Type == "Ready" {
			ready, why = c.Status == "True", c.Message
		}
	}
	if !ready {
		return fmt.Errorf("node %s to be Ready: %s", name, why)
	}
	for _, t := range node.Spec.Taints {
		if t.Effect == "NoSchedule" || t.Effect == "NoExecute" {
			return fmt.Errorf("node %s to lose the taint %s:%s", name, t.Key, t.Effect)
		}
	}
	return nil
}

// ask succeeds with any address.
func (q Question) ask(ctx context.Context) error {
	r := net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "udp", q.Server)
	}}
	addresses, err := r.LookupHost(ctx, q.Name+".") // the dot: whatever resolv.conf searches
	if err == nil && len(addresses) == 0 {
		err = errors.New("no address")
	}
	return err
}

// watcher has somebody look, once at a time, for callers who don't want to
// wait for the end of it.
type watcher struct {
	look func(context.Context) view
	all  *sync.WaitGroup // every look that goes on

	mu      sync.Mutex
	last    view
	looking chan struct{} // closed at the end of the look that goes on; nil: none does
}

// latest looks, and returns what was seen: this time if that is soon enough,
// else the time before. The look ends with ctx.
func (w *watcher) latest(ctx context.Context, patience time.Duration) view {
	w.mu.Lock()
	if w.looking == nil {
		done := make(chan struct{})
		w.looking = done
		w.all.Go(func() { w.run(ctx, done) })
	}
	looking := w.looking
	w.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-looking:
	case <-timer.C:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

func (w *watcher) run(ctx context.Context, done chan struct{}) {
	v := w.look(ctx)
	w.mu.Lock()
	w.last, w.looking = v, nil
	w.mu.Unlock()
	close(done)
}
