// Package loadbalancer answers for Services of type LoadBalancer: it gives each the ingress "localhost".
//
// The port itself is opened by the host of the sandbox, which watches the same Services; what it reaches is the Service's node port.
// Here only the Service's status is written, for those whose class is empty or hutch.run/localhost. Tests use a fake API.
package loadbalancer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/hutch-run/hutch/kube/internal/loop"
)

// Class is the class of load balancers that this is.
const Class = "hutch.run/localhost"

// Hostname is where the host opens the ports.
const Hostname = "localhost"

// Controller writes the status of Services.
type Controller struct {
	api    kubernetes.Interface
	tell   func(error)
	synced atomic.Bool
}

// New makes a controller; tell is told what went wrong and is tried again.
func New(api kubernetes.Interface, tell func(error)) *Controller {
	return &Controller{api: api, tell: tell}
}

// Ready tells whether every Service was looked at once.
func (c *Controller) Ready(context.Context) error {
	if !c.synced.Load() {
		return errors.New("not synced")
	}
	return nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	factory := informers.NewSharedInformerFactory(c.api, 0)
	services := factory.Core().V1().Services()
	q := loop.NewQueue()
	synced, err := loop.Watch(services.Informer(), func(s *core.Service) {
		if wants(s) {
			q.Add(s)
		}
	})
	if err != nil {
		return fmt.Errorf("watch services: %w", err)
	}
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), synced) {
		return nil
	}
	c.synced.Store(true)
	q.Run(ctx, func(ctx context.Context, name cache.ObjectName) error {
		return c.sync(ctx, name, services.Lister())
	}, func(err error) { c.tell(fmt.Errorf("write the status of service %w", err)) })
	return nil
}

func (c *Controller) sync(ctx context.Context, name cache.ObjectName, services listers.ServiceLister) error {
	s, err := services.Services(name.Namespace).Get(name.Name)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil || !wants(s) {
		return err
	}
	s = s.DeepCopy()
	s.Status.LoadBalancer.Ingress = ingress()
	_, err = c.api.CoreV1().Services(s.Namespace).UpdateStatus(ctx, s, meta.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// wants tells whether the Service's status isn't what it should be. A Service that is no load balancer any more is cleared by the API server.
func wants(s *core.Service) bool {
	if s.Spec.Type != core.ServiceTypeLoadBalancer || s.DeletionTimestamp != nil {
		return false
	}
	if c := s.Spec.LoadBalancerClass; c != nil && *c != Class {
		return false
	}
	return !slices.EqualFunc(s.Status.LoadBalancer.Ingress, ingress(), func(a, b core.LoadBalancerIngress) bool {
		return a.Hostname == b.Hostname && a.IP == b.IP
	})
}

func ingress() []core.LoadBalancerIngress {
	return []core.LoadBalancerIngress{{Hostname: Hostname}}
}
