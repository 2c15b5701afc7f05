package control

import (
	"fmt"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"

	"github.com/hutch-run/hutch/kube/internal/pki"
)

// Params are what the parts of the control plane have in common.
type Params struct {
	Data         string // directory for files of settings
	PKI          *pki.Dir
	Etcd         string // URL
	NodeIP       string
	Port         int // of the API
	PodCIDR      string
	ServiceCIDR  string
	Domain       string
	Controllers  int // port of the controller manager
	Scheduler    int // port of the scheduler
	VolumePlugin string
	Kubeconfig   func(user string) string // a user's file
}

// Names of leaves in the PKI. A user's kubeconfig has the name of its leaf.
const (
	LeafAPI           = "apiserver"
	LeafKubeletClient = "apiserver-kubelet-client"
	LeafFrontProxy    = "front-proxy-client"
	LeafControllers   = "controller-manager"
	LeafScheduler     = "scheduler"
)

func parse(sets cliflag.NamedFlagSets, args []string) error {
	all := pflag.NewFlagSet("hutch-kube", pflag.ContinueOnError)
	all.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	for _, s := range sets.FlagSets {
		all.AddFlagSet(s)
	}
	if err := all.Parse(args); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	return nil
}

// serving are the flags of a component that serves its health on loopback with a certificate of the cluster: one that makes its own would spend seconds of an emulated
// processor on an RSA key.
func (p Params) serving(leaf string, port int) []string {
	return []string{
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port),
		"--tls-cert-file=" + p.PKI.Cert(leaf), "--tls-private-key-file=" + p.PKI.Key(leaf),
		"--kubeconfig=" + p.Kubeconfig(leaf), "--authentication-kubeconfig=" + p.Kubeconfig(leaf), "--authorization-kubeconfig=" + p.Kubeconfig(leaf),
		"--client-ca-file=" + p.PKI.Cert("ca"), "--requestheader-client-ca-file=" + p.PKI.Cert("front-proxy-ca"),
		"--leader-elect=false", "--profiling=false",
	}
}
