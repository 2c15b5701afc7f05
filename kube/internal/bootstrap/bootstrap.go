// Package bootstrap puts the objects into a cluster that its own parts need: their roles, the DNS Service and the default storage class.
//
// It owns these objects: what others changed in them is set back at every start, except a default storage class that somebody made another
// one. It makes no namespace and deletes nothing. Tests use a fake API.
package bootstrap

import (
	"context"
	"fmt"
	"maps"
	"net"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	rbac "k8s.io/api/rbac/v1"
	storage "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

// Users of the cluster's own parts: the common names of their certificates.
const (
	DNSUser          = "hutch:dns"
	StorageUser      = "hutch:storage"
	LoadBalancerUser = "hutch:loadbalancer"
	KubeletClient    = "hutch:apiserver-to-kubelet"
)

// Provisioner is the name of the volumes' maker.
const Provisioner = "hutch.run/local"

// StorageClass is the default one.
const StorageClass = "hutch-local"

// managed marks what belongs to this package.
func managed() map[string]string {
	return map[string]string{"app.kubernetes.io/managed-by": "hutch-kube"}
}

// DNS says where the cluster's DNS is.
type DNS struct {
	ServiceIP string
	NodeIP    string
	Port      int32
}

// Apply makes the objects what they should be.
func Apply(ctx context.Context, api kubernetes.Interface, dns DNS) error {
	for _, r := range roles() {
		if err := applyRole(ctx, api, r); err != nil {
			return err
		}
	}
	if err := applyBinding(ctx, api, "system:kubelet-api-admin", KubeletClient); err != nil {
		return err
	}
	if err := applyService(ctx, api, dns); err != nil {
		return err
	}
	if err := applySlice(ctx, api, dns); err != nil {
		return err
	}
	return applyClass(ctx, api)
}

type role struct {
	user  string
	rules []rbac.PolicyRule
}

func rule(group, resources string, verbs ...string) rbac.PolicyRule {
	return rbac.PolicyRule{APIGroups: []string{group}, Resources: []string{resources}, Verbs: verbs}
}

func roles() []role {
	watch := []string{"get", "list", "watch"}
	return []role{{
		user: DNSUser,
		rules: []rbac.PolicyRule{
			rule("", "services", watch...), rule("", "namespaces", watch...), rule("", "pods", watch...), rule("", "nodes", "get"),
			rule("discovery.k8s.io", "endpointslices", watch...),
		},
	}, {
		user: StorageUser,
		rules: []rbac.PolicyRule{
			rule("", "persistentvolumes", append(watch, "create", "update", "patch", "delete")...),
			rule("", "persistentvolumeclaims", append(watch, "update")...),
			rule("storage.k8s.io", "storageclasses", watch...),
			rule("", "nodes", watch...),
			rule("", "events", "create", "patch", "update", "get", "list", "watch"),
		},
	}, {
		user: LoadBalancerUser,
		rules: []rbac.PolicyRule{
			rule("", "services", watch...), rule("", "services/status", "update", "patch"),
		},
	}}
}

func applyRole(ctx context.Context, api kubernetes.Interface, r role) error {
	want := &rbac.ClusterRole{ObjectMeta: meta.ObjectMeta{Name: r.user, Labels: managed()}, Rules: r.rules}
	client := api.RbacV1().ClusterRoles()
	have, err := client.Get(ctx, r.user, meta.GetOptions{})
	switch {
	case errors.IsNotFound(err):
		_, err = client.Create(ctx, want, meta.CreateOptions{})
	case err == nil && !equality.Semantic.DeepEqual(have.Rules, want.Rules):
		have.Rules = want.Rules
		_, err = client.Update(ctx, have, meta.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("apply role %s: %w", r.user, err)
	}
	return applyBinding(ctx, api, r.user, r.user)
}

func applyBinding(ctx context.Context, api kubernetes.Interface, role, user string) error {
	want := &rbac.ClusterRoleBinding{
		ObjectMeta: meta.ObjectMeta{Name: user, Labels: managed()},
		RoleRef:    rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: role},
		Subjects:   []rbac.Subject{{APIGroup: rbac.GroupName, Kind: rbac.UserKind, Name: user}},
	}
	client := api.RbacV1().ClusterRoleBindings()
	have, err := client.Get(ctx, user, meta.GetOptions{})
	switch {
	case errors.IsNotFound(err):
		_, err = client.Create(ctx, want, meta.CreateOptions{})
	case err == nil && !equality.Semantic.DeepEqual(have.Subjects, want.Subjects):
		have.Subjects = want.Subjects
		_, err = client.Update(ctx, have, meta.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("apply binding of %s: %w", user, err)
	}
	return nil
}

const dnsName = "kube-dns"

func applyService(ctx context.Context, api kubernetes.Interface, dns DNS) error {
	labels := managed()
	maps.Copy(labels, map[string]string{"k8s-app": dnsName, "kubernetes.io/name": "CoreDNS"})
	want := &core.Service{
		ObjectMeta: meta.ObjectMeta{Name: dnsName, Namespace: meta.NamespaceSystem, Labels: labels},
		Spec: core.ServiceSpec{
			ClusterIP: dns.ServiceIP,
			// No selector: DNS is served by the node, not by a pod.
			Ports: []core.ServicePort{
				{Name: "dns", Protocol: core.ProtocolUDP, Port: 53, TargetPort: intstr.FromInt32(dns.Port)},
				{Name: "dns-tcp", Protocol: core.ProtocolTCP, Port: 53, TargetPort: intstr.FromInt32(dns.Port)},
			},
		},
	}
	client := api.CoreV1().Services(meta.NamespaceSystem)
	have, err := client.Get(ctx, dnsName, meta.GetOptions{})
	switch {
	case errors.IsNotFound(err):
		_, err = client.Create(ctx, want, meta.CreateOptions{})
	case err == nil && (have.Spec.Selector != nil || !equality.Semantic.DeepEqual(have.Spec.Ports, want.Spec.Ports)):
		have.Spec.Selector, have.Spec.Ports = nil, want.Spec.Ports
		_, err = client.Update(ctx, have, meta.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("apply service %s: %w", dnsName, err)
	}
	return nil
}

// applySlice says where DNS is served. On loopback, as in tests, it can't be told: no pod would find it.
func applySlice(ctx context.Context, api kubernetes.Interface, dns DNS) error {
	const name = "kube-dns-hutch"
	if net.ParseIP(dns.NodeIP).IsLoopback() {
		return nil
	}
	labels := managed()
	maps.Copy(labels, map[string]string{discovery.LabelServiceName: dnsName, discovery.LabelManagedBy: "hutch-kube"})
	ready := true
	port := func(name string, p core.Protocol) discovery.EndpointPort {
		return discovery.EndpointPort{Name: &name, Protocol: &p, Port: &dns.Port}
	}
	want := &discovery.EndpointSlice{
		ObjectMeta:  meta.ObjectMeta{Name: name, Namespace: meta.NamespaceSystem, Labels: labels},
		AddressType: discovery.AddressTypeIPv4,
		Endpoints:   []discovery.Endpoint{{Addresses: []string{dns.NodeIP}, Conditions: discovery.EndpointConditions{Ready: &ready}}},
		Ports:       []discovery.EndpointPort{port("dns", core.ProtocolUDP), port("dns-tcp", core.ProtocolTCP)},
	}
	client := api.DiscoveryV1().EndpointSlices(meta.NamespaceSystem)
	have, err := client.Get(ctx, name, meta.GetOptions{})
	switch {
	case errors.IsNotFound(err):
		_, err = client.Create(ctx, want, meta.CreateOptions{})
	case err == nil:
		have.Labels, have.Endpoints, have.Ports = want.Labels, want.Endpoints, want.Ports
		_, err = client.Update(ctx, have, meta.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("apply the endpoints of %s: %w", dnsName, err)
	}
	return nil
}

// applyClass makes the storage class once: its parameters can't be changed, and its being the default is the user's to take away.
func applyClass(ctx context.Context, api kubernetes.Interface) error {
	late, remove := storage.VolumeBindingWaitForFirstConsumer, core.PersistentVolumeReclaimDelete
	_, err := api.StorageV1().StorageClasses().Create(ctx, &storage.StorageClass{
		ObjectMeta: meta.ObjectMeta{
			Name: StorageClass, Labels: managed(),
			Annotations: map[string]string{"storageclass.kubernetes.io/is-default-class": "true"},
		},
		Provisioner: Provisioner, VolumeBindingMode: &late, ReclaimPolicy: &remove,
	}, meta.CreateOptions{})
	if err != nil && !errors.IsAlreadyExists(err) {
		return fmt.Errorf("apply storage class %s: %w", StorageClass, err)
	}
	return nil
}
