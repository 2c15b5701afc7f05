package recipe

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hutch-run/hutch/internal/fault"
)

// What the recipe kubernetes takes from the directory of hutch's programs: a
// Kubernetes in one program, and what hutch-agent has to know of it.
const (
	kubeProgram      = "hutch-kube"
	kubeDistribution = "hutch-kube.json"
)

// kubernetes is a system with Debian's containerd and its plugins for networks,
// and hutch-kube, which is no package's.
func kubernetes() system {
	return system{
		packages: []string{
			"containerd", "runc", "containernetworking-plugins", "iptables", "nftables", "conntrack", "ethtool", "ipset",
			"kmod", "util-linux", "mount", "socat",
		},
		without: starters(),
		extras:  kubernetesExtras,
	}
}

func kubernetesExtras(k *kitchen) ([]extra, error) {
	program, distribution := filepath.Join(k.Programs, kubeProgram), filepath.Join(k.Programs, kubeDistribution)
	for _, path := range []string{program, distribution} {
		switch info, err := os.Stat(path); {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fault.New(fault.Precondition, "there is no %s, which this recipe puts into the image; `make kube` builds it", path)
		case err != nil:
			return nil, err
		case !info.Mode().IsRegular():
			return nil, fault.New(fault.Precondition, "%s is no file", path)
		}
	}
	return []extra{
		{name: "usr/local/bin/" + kubeProgram, mode: 0o755, file: program},
		{name: "usr/local/bin/kubectl", link: kubeProgram},
		{name: "usr/lib/hutch/kubernetes.json", mode: 0o644, file: distribution},
		{name: containerdConfig, mode: 0o644, text: kubernetesContainerd},
	}, nil
}

// kubernetesContainerd has containerd serve Kubernetes. The image that keeps a
// pod's namespaces is one that hutch-kube brings.
const kubernetesContainerd = `version = 2
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "hutch.local/pause:1"
  disable_apparmor = true

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
`
