package server

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/hutch-run/hutch/kube/internal/bootstrap"
	"github.com/hutch-run/hutch/kube/internal/control"
	"github.com/hutch-run/hutch/kube/internal/node"
	"github.com/hutch-run/hutch/kube/internal/pki"
)

// Leaves of the cluster's own parts and of its administrator.
const (
	leafAdmin        = "admin"
	leafDNS          = "dns"
	leafStorage      = "storage"
	leafLoadBalancer = "loadbalancer"
)

// keys are the cluster's certificates and the kubeconfigs of its users.
type keys struct {
	o      *Options
	dir    *pki.Dir
	leaves []pki.Leaf
}

func openKeys(o *Options) (*keys, error) {
	dir, err := pki.Open(filepath.Join(o.Data, "pki"), time.Now)
	if err != nil {
		return nil, err
	}
	k := &keys{o: o, dir: dir, leaves: leaves(o)}
	for _, l := range k.leaves {
		if _, err := dir.Ensure(l); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Join(o.Data, "kubeconfig"), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of kubeconfigs: %w", err)
	}
	for _, l := range k.leaves {
		if err := dir.WriteConfig(pki.Config{Path: k.kubeconfig(l.File), Server: o.api(), Leaf: l.File, Name: ConfigName}); err != nil {
			return nil, err
		}
	}
	return k, k.export()
}

// kubeconfig is the file of a user; every leaf has one.
func (k *keys) kubeconfig(leaf string) string {
	return filepath.Join(k.o.Data, "kubeconfig", leaf)
}

// export writes the administrator's kubeconfig, which carries its certificate.
func (k *keys) export() error {
	return k.dir.ExportConfig(pki.Config{Path: filepath.Join(k.o.Data, "admin.kubeconfig"), Server: k.o.api(), Leaf: leafAdmin, Name: ConfigName})
}

func leaves(o *Options) []pki.Leaf {
	loopback := net.ParseIP("127.0.0.1")
	nodeIP := net.ParseIP(o.NodeIP)
	return []pki.Leaf{
		{
			File: control.LeafAPI, User: "kube-apiserver", IPs: []net.IP{loopback, net.ParseIP("::1"), net.ParseIP(ServiceIP), nodeIP},
			Names: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + Domain},
		},
		{File: control.LeafKubeletClient, User: bootstrap.KubeletClient},
		{File: control.LeafFrontProxy, User: control.LeafFrontProxy, Proxy: true},
		{File: control.LeafControllers, User: "system:kube-controller-manager", IPs: []net.IP{loopback}},
		{File: control.LeafScheduler, User: "system:kube-scheduler", IPs: []net.IP{loopback}},
		{File: node.LeafKubelet, User: "system:node:" + o.NodeName, Groups: []string{"system:nodes"}, IPs: []net.IP{nodeIP, loopback}, Names: []string{o.NodeName}},
		{File: node.LeafProxy, User: "system:kube-proxy"},
		{File: leafDNS, User: bootstrap.DNSUser},
		{File: leafStorage, User: bootstrap.StorageUser},
		{File: leafLoadBalancer, User: bootstrap.LoadBalancerUser},
		{File: leafAdmin, User: "admin", Groups: []string{"system:masters"}},
	}
}
