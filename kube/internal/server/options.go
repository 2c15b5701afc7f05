package server

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/hutch-run/hutch/kube/internal/cni"
	"github.com/hutch-run/hutch/kube/internal/reset"
)

// What is the same in every cluster.
const (
	Domain      = "cluster.local"
	PodCIDR     = "10.42.0.0/24"
	ServiceCIDR = "10.43.0.0/16"
	ServiceIP   = "10.43.0.1"
	DNSIP       = "10.43.0.10"
	// ConfigName is the name of cluster, user and context in the administrator's kubeconfig.
	ConfigName = "hutch"
)

// Options are the flags of server and reset.
type Options struct {
	Data        string
	Kubelet     string
	CRI         string
	NodeIP      string
	NodeName    string
	CNIConf     string
	CNIBin      string
	ResolvConf  string
	Status      string
	Port        int
	Controllers int
	Scheduler   int
	DNS         int
	StopTimeout time.Duration
	Grace       time.Duration
	KeepPods    bool
	WithoutNode bool
	JSON        bool
}

// Places registers the flags that say where a cluster is.
func (o *Options) Places(fs *flag.FlagSet) {
	fs.StringVar(&o.Data, "data", "/var/lib/hutch-kube", "the cluster's data")
	fs.StringVar(&o.Kubelet, "kubelet-dir", "/var/lib/kubelet", "kubelet's directory")
	fs.StringVar(&o.CRI, "cri", "unix:///run/containerd/containerd.sock", "address of containerd")
	fs.DurationVar(&o.Grace, "grace", 10*time.Second, "the longest that a container may take to end")
	fs.DurationVar(&o.StopTimeout, "stop-timeout", 25*time.Second, "the longest that an end may take")
}

// Server registers the flags of a server.
func (o *Options) Server(fs *flag.FlagSet) {
	o.Places(fs)
	fs.StringVar(&o.NodeIP, "node-ip", "198.18.0.2", "the node's address")
	fs.StringVar(&o.NodeName, "node-name", "node", "the node's name")
	fs.StringVar(&o.CNIConf, "cni-conf-dir", "/etc/cni/net.d", "where containerd looks for networks")
	fs.StringVar(&o.CNIBin, "cni-bin-dir", "/usr/lib/cni", "where containerd looks for network plugins")
	fs.StringVar(&o.ResolvConf, "resolv-conf", "/etc/resolv.conf", "who is asked for names outside of the cluster")
	fs.StringVar(&o.Status, "status", "127.0.0.1:10270", "where the state of the parts is served")
	fs.IntVar(&o.Port, "port", 6443, "port of the API")
	fs.IntVar(&o.Controllers, "controllers-port", 10257, "port of the controllers' health, on loopback")
	fs.IntVar(&o.Scheduler, "scheduler-port", 10259, "port of the scheduler's health, on loopback")
	fs.IntVar(&o.DNS, "dns-port", 10053, "port of DNS, on the node's address")
	fs.BoolVar(&o.KeepPods, "keep-pods", false, "leave pods running at the end")
	fs.BoolVar(&o.WithoutNode, "without-node", false, "the control plane only: no containerd, no pods")
}

// Check says what is wrong with the options.
func (o *Options) Check() error {
	if ip := net.ParseIP(o.NodeIP); ip == nil || ip.To4() == nil {
		return fmt.Errorf("--node-ip %q: not an IPv4 address", o.NodeIP)
	}
	if !filepath.IsAbs(o.Data) || !filepath.IsAbs(o.Kubelet) {
		return errors.New("--data and --kubelet-dir must be absolute")
	}
	// A unix socket's path has 107 bytes.
	if len(o.Data) > 80 {
		return fmt.Errorf("--data %q: longer than 80 bytes", o.Data)
	}
	return nil
}

// ResetPlaces says what reset may take away.
func (o *Options) ResetPlaces() reset.Places {
	return reset.Places{
		Data: o.Data, Kubelet: o.Kubelet, Namespace: "k8s.io", Cgroups: []string{"kubepods"}, Bridge: cni.Bridge, Network: "hutch",
		Mounts: []string{"/run/containerd/io.containerd.runtime.v2.task/k8s.io", "/run/containerd/io.containerd.grpc.v1.cri"},
	}
}

func (o *Options) api() string { return fmt.Sprintf("https://127.0.0.1:%d", o.Port) }
