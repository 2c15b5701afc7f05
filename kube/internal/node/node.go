// Package node runs what a node of the cluster needs: kubelet and kube-proxy, of unmodified upstream modules, in this process.
//
// Each runs until its context ends, but a kubelet in a process can't be ended: its workers go on until the process does. So whoever ends
// pods does it after that. Nothing here depends on the host's name. It is tried in a VM.
package node

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	config "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"

	"github.com/hutch-run/hutch/kube/internal/pki"
)

// Names of leaves in the PKI, and ports of health on loopback.
const (
	LeafKubelet = "kubelet"
	LeafProxy   = "kube-proxy"
	KubeletPort = 10248
	ProxyPort   = 10256
)

// Params say what the node is.
type Params struct {
	Name       string
	IP         string
	Dir        string // kubelet's
	CRI        string // unix:// address
	PKI        *pki.Dir
	ClusterDNS string
	Domain     string
	PodCIDR    string
	Kubeconfig func(user string) string
}

// RunKubelet registers the node and runs its pods until ctx ends, more or less.
func RunKubelet(ctx context.Context, p Params) error {
	s, err := options.NewKubeletServer()
	if err != nil {
		return fmt.Errorf("set up kubelet: %w", err)
	}
	p.flags(&s.KubeletFlags)
	p.settings(&s.KubeletConfiguration)
	if err := options.ValidateKubeletFlags(&s.KubeletFlags); err != nil {
		return err
	}
	if err := validation.ValidateKubeletConfiguration(&s.KubeletConfiguration, utilfeature.DefaultFeatureGate); err != nil {
		return err
	}
	deps, err := kubelet.UnsecuredDependencies(ctx, s, utilfeature.DefaultFeatureGate)
	if err != nil {
		return fmt.Errorf("set up kubelet: %w", err)
	}
	return kubelet.Run(ctx, s, deps, utilfeature.DefaultFeatureGate)
}

func (p Params) flags(f *options.KubeletFlags) {
	f.KubeConfig = p.Kubeconfig(LeafKubelet)
	f.HostnameOverride, f.NodeIP = p.Name, p.IP
	f.RootDirectory, f.CertDirectory = p.Dir, filepath.Join(p.Dir, "pki")
}

// VolumePlugins is where kubelet looks for programs that make volumes.
func (p Params) VolumePlugins() string { return filepath.Join(p.Dir, "volumeplugins") }

func (p Params) settings(c *config.KubeletConfiguration) {
	c.ContainerRuntimeEndpoint = p.CRI
	c.CgroupDriver = "cgroupfs"
	c.Authentication.Anonymous.Enabled = false
	c.Authentication.Webhook.Enabled = true
	c.Authentication.X509.ClientCAFile = p.PKI.Cert("ca")
	c.Authorization.Mode = config.KubeletAuthorizationModeWebhook
	c.TLSCertFile, c.TLSPrivateKeyFile = p.PKI.Cert(LeafKubelet), p.PKI.Key(LeafKubelet)
	c.ClusterDomain, c.ClusterDNS = p.Domain, []string{p.ClusterDNS}
	c.HealthzBindAddress, c.HealthzPort = "127.0.0.1", KubeletPort
	c.VolumePluginDir = p.VolumePlugins()
	c.FailSwapOn, c.FailCgroupV1 = false, false
	c.SerializeImagePulls = false
	// The machine is small, and all of it is the cluster's.
	c.EvictionHard = map[string]string{"memory.available": "50Mi", "nodefs.available": "5%", "nodefs.inodesFree": "5%", "imagefs.available": "5%"}
	c.NodeStatusUpdateFrequency = meta.Duration{Duration: 5 * time.Second}
	c.ShutdownGracePeriod = meta.Duration{}
	c.EnableSystemLogHandler = false
	// kube-proxy in nftables mode opens no way that these chains would have to close.
	c.MakeIPTablesUtilChains = false
}

// RunProxy keeps the rules of Services until ctx ends. The API must be there.
func RunProxy(ctx context.Context, p Params) error {
	o := proxy.NewOptions()
	fs := pflag.NewFlagSet("kube-proxy", pflag.ContinueOnError)
	o.AddFlags(fs)
	err := fs.Parse([]string{
		"--kubeconfig=" + p.Kubeconfig(LeafProxy), "--hostname-override=" + p.Name, "--bind-address=" + p.IP,
		"--proxy-mode=nftables", "--cluster-cidr=" + p.PodCIDR,
		fmt.Sprintf("--healthz-bind-address=127.0.0.1:%d", ProxyPort), "--metrics-bind-address=127.0.0.1:10249",
		// The machine's own settings of connection tracking stay.
		"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
	})
	if err != nil {
		return fmt.Errorf("set up kube-proxy: %w", err)
	}
	if err := o.Complete(fs); err != nil {
		return fmt.Errorf("set up kube-proxy: %w", err)
	}
	if err := o.Validate(); err != nil {
		return fmt.Errorf("set up kube-proxy: %w", err)
	}
	return o.Run(ctx)
}
