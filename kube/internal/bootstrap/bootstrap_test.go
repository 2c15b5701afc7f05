package bootstrap

import (
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestApplySetsBackWhatOthersChanged(t *testing.T) {
	api, dns := fake.NewClientset(), DNS{ServiceIP: "10.43.0.10", NodeIP: "198.18.0.2", Port: 10053}
	for range 2 {
		if err := Apply(t.Context(), api, dns); err != nil {
			t.Fatal(err)
		}
	}
	services := api.CoreV1().Services(meta.NamespaceSystem)
	svc, err := services.Get(t.Context(), "kube-dns", meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	svc.Spec.Ports = []core.ServicePort{{Port: 1}}
	if _, err := services.Update(t.Context(), svc, meta.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	role, err := api.RbacV1().ClusterRoles().Get(t.Context(), DNSUser, meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	role.Rules = nil
	if _, err := api.RbacV1().ClusterRoles().Update(t.Context(), role, meta.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	dns.NodeIP = "198.18.0.3"
	if err := Apply(t.Context(), api, dns); err != nil {
		t.Fatal(err)
	}
	if svc, _ = services.Get(t.Context(), "kube-dns", meta.GetOptions{}); len(svc.Spec.Ports) != 2 || svc.Spec.ClusterIP != "10.43.0.10" {
		t.Errorf("service: %+v", svc.Spec)
	}
	if role, _ = api.RbacV1().ClusterRoles().Get(t.Context(), DNSUser, meta.GetOptions{}); len(role.Rules) == 0 {
		t.Error("the role stays empty")
	}
	slice, err := api.DiscoveryV1().EndpointSlices(meta.NamespaceSystem).Get(t.Context(), "kube-dns-hutch", meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if slice.Endpoints[0].Addresses[0] != "198.18.0.3" || *slice.Ports[0].Port != 10053 {
		t.Errorf("endpoints: %+v", slice)
	}
}

func TestUserMayTakeTheDefaultAway(t *testing.T) {
	api := fake.NewClientset()
	if err := Apply(t.Context(), api, DNS{}); err != nil {
		t.Fatal(err)
	}
	classes := api.StorageV1().StorageClasses()
	c, err := classes.Get(t.Context(), StorageClass, meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.Annotations = nil
	if _, err := classes.Update(t.Context(), c, meta.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := Apply(t.Context(), api, DNS{}); err != nil {
		t.Fatal(err)
	}
	if c, _ = classes.Get(t.Context(), StorageClass, meta.GetOptions{}); len(c.Annotations) != 0 {
		t.Fatalf("annotations: %v", c.Annotations)
	}
}
