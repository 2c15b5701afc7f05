package ports

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// APIPort is where a cluster's API listens in the guest, and APIOwner who
// publishes it.
const (
	APIPort  = 6443
	APIOwner = "kubernetes"
)

// maxServices bounds what is read of a list of Services, in bytes.
const maxServices = 16 << 20

// API is the API of a cluster for one life of it.
type API struct {
	// Get asks for a path, with the rights of an administrator and without a
	// limit of time.
	Get func(ctx context.Context, path string) (*http.Response, error)
	// Gone is closed when the cluster has ended.
	Gone <-chan struct{}
}

// Kubernetes is a Source: a cluster's API, and its Services that are to be
// reached from outside.
type Kubernetes struct {
	await func(ctx context.Context) (API, error)
	log   *slog.Logger
}

// NewKubernetes returns the source of a cluster. await waits until its API
// answers, and fails only when ctx ends or there will be no more clusters.
func NewKubernetes(await func(ctx context.Context) (API, error), log *slog.Logger) *Kubernetes {
	return &Kubernetes{await: await, log: log}
}

// Run implements Source.
func (k *Kubernetes) Run(ctx context.Context, to *Sink) {
	to.Settle() // a cluster takes its time, and nobody need wait for it
	for ctx.Err() == nil {
		api, err := k.await(ctx)
		if err != nil {
			if ctx.Err() == nil {
				k.log.Warn("wait for the cluster's API", "error", err)
			}
			return
		}
		k.live(ctx, api, to)
		to.Replace(nil)
	}
}

// live follows one life of the cluster.
func (k *Kubernetes) live(ctx context.Context, api API, to *Sink) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	go func() {
		defer close(over)
		select {
		case <-api.Gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	defer func() {
		cancel()
		<-over
	}()
	to.Set(apiOwner())
	wait := firstBackoff
	for ctx.Err() == nil {
		began := time.Now()
		err := k.follow(ctx, api, to)
		if ctx.Err() != nil {
			return
		}
		k.log.Debug("follow services", "error", err)
		if time.Since(began) > steady {
			wait = firstBackoff
		}
		if delay.For(ctx, wait) != nil {
			return
		}
		wait = min(2*wait, lastBackoff)
	}
}

func apiOwner() Owner {
	return Owner{ID: APIOwner, Name: "Kubernetes API", Bindings: []Binding{{ContainerPort: APIPort, Protocol: "tcp", HostIP: "127.0.0.1"}}}
}

// service is what counts of a Service.
type service struct {
	Metadata struct {
		Name, Namespace string
		ResourceVersion string `json:"resourceVersion"`
	}
	Spec struct {
		Type  string
		Ports []struct {
			Port     int
			NodePort int `json:"nodePort"`
			Protocol string
		}
	}
}

// owner is what a Service publishes. Each node port is one of the machine
// itself: that is where a connection goes, from the Service's own port for a
// load balancer.
func (s service) owner() Owner {
	o := Owner{ID: "service/" + s.Metadata.Namespace + "/" + s.Metadata.Name, Name: s.Metadata.Namespace + "/" + s.Metadata.Name}
	if s.Spec.Type != "LoadBalancer" && s.Spec.Type != "NodePort" {
		return o
	}
	for _, p := range s.Spec.Ports {
		protocol := strings.ToLower(cmp.Or(p.Protocol, "TCP"))
		if (protocol != "tcp" && protocol != "udp") || !isPort(p.NodePort) || !isPort(p.Port) {
			continue
		}
		at := p.NodePort
		if s.Spec.Type == "LoadBalancer" {
			at = p.Port
		}
		o.Bindings = append(o.Bindings, Binding{ContainerPort: uint16(p.NodePort), HostPort: uint16(at), Protocol: protocol})
	}
	sortBindings(o.Bindings)
	return o
}

func isPort(n int) bool { return n > 0 && n < 1<<16 }

// follow lists the Services and watches them until the watch ends.
func (k *Kubernetes) follow(ctx context.Context, api API, to *Sink) error {
	version, err := k.list(ctx, api, to)
	if err != nil {
		return err
	}
	for {
		if version, err = k.watch(ctx, api, version, to); err != nil {
			return err
		}
	}
}

const servicesPath = "/api/v1/services"

// list tells all Services, and returns the version that they are of.
func (k *Kubernetes) list(ctx context.Context, api API, to *Sink) (version string, err error) {
	res, err := get(ctx, api, servicesPath)
	if err != nil {
		return "", fmt.Errorf("list services: %w", err)
	}
	defer res.Body.Close()
	var list struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		}
		Items []service
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxServices)).Decode(&list); err != nil {
		return "", fmt.Errorf("list services: %w", err)
	}
	all := []Owner{apiOwner()}
	for _, s := range list.Items {
		if o := s.owner(); len(o.Bindings) > 0 {
			all = append(all, o)
		}
	}
	to.Replace(all)
	return list.Metadata.ResourceVersion, nil
}

// watch tells what changes after a version until the server ends the watch, as
// it does from time to time, and returns the version of then.
func (k *Kubernetes) watch(ctx context.Context, api API, version string, to *Sink) (string, error) {
	query := url.Values{"watch": {"1"}, "resourceVersion": {version}, "allowWatchBookmarks": {"true"}}
	res, err := get(ctx, api, servicesPath+"?"+query.Encode())
	if err != nil {
		return version, fmt.Errorf("watch services: %w", err)
	}
	defer res.Body.Close()
	began := time.Now()
	for decoder := json.NewDecoder(res.Body); ; {
		var e struct {
			Type   string
			Object service
		}
		err := decoder.Decode(&e)
		if errors.Is(err, io.EOF) && time.Since(began) > steady {
			return version, nil
		}
		if err != nil {
			return version, fmt.Errorf("watch services: %w", err)
		}
		switch e.Type {
		case "ADDED", "MODIFIED":
			to.Set(e.Object.owner())
		case "DELETED":
			to.Remove(e.Object.owner().ID)
		case "BOOKMARK":
		default:
			return version, fmt.Errorf("watch services: the server says %q", e.Type) // the version is too old
		}
		version = e.Object.Metadata.ResourceVersion
	}
}

// get asks the API; the answer is 200.
func get(ctx context.Context, api API, path string) (*http.Response, error) {
	res, err := api.Get(ctx, path)
	if err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	b, _ := io.ReadAll(io.LimitReader(res.Body, 256))
	res.Body.Close()
	return nil, fmt.Errorf("the API answers %s: %q", res.Status, b)
}
