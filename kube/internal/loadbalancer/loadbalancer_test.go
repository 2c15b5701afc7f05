package loadbalancer

import (
	"context"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func service(name string, kind core.ServiceType, class *string) *core.Service {
	return &core.Service{
		ObjectMeta: meta.ObjectMeta{Name: name, Namespace: "default"},
		Spec:       core.ServiceSpec{Type: kind, LoadBalancerClass: class},
	}
}

func TestServicesGetTheirIngress(t *testing.T) {
	other, own := "example.org/lb", Class
	api := fake.NewClientset(
		service("plain", core.ServiceTypeClusterIP, nil),
		service("other", core.ServiceTypeLoadBalancer, &other),
		service("a", core.ServiceTypeLoadBalancer, nil),
	)
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	c := New(api, func(err error) { t.Error(err) })
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	await(ctx, t, api, "a")
	if err := c.Ready(ctx); err != nil {
		t.Error(err)
	}
	if _, err := api.CoreV1().Services("default").Create(ctx, service("b", core.ServiceTypeLoadBalancer, &own), meta.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(ctx, t, api, "b")
	for _, name := range []string{"plain", "other"} {
		s, err := api.CoreV1().Services("default").Get(ctx, name, meta.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Status.LoadBalancer.Ingress) != 0 {
			t.Errorf("%s has an ingress", name)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// await waits until the service has its ingress.
func await(ctx context.Context, t *testing.T, api *fake.Clientset, name string) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		s, err := api.CoreV1().Services("default").Get(ctx, name, meta.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if in := s.Status.LoadBalancer.Ingress; len(in) == 1 && in[0].Hostname == Hostname {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("service %s has no ingress", name)
		case <-tick.C:
		}
	}
}
