package recipe

import "regexp"

// docker is a system with Debian's Docker. hutch-agent starts and looks after
// containerd and dockerd, so the packages' own ways to start them are left out:
// a second daemon on the same data would destroy it.
func docker() system {
	return system{
		packages: []string{"docker.io", "containerd", "runc", "iptables", "kmod"},
		without:  starters(),
		extras: func(*kitchen) ([]extra, error) {
			return []extra{{name: containerdConfig, mode: 0o644, text: dockerContainerd}}, nil
		},
	}
}

// starters matches what an init system would start daemons by.
func starters() *regexp.Regexp {
	return regexp.MustCompile(`^(usr/lib/systemd|etc/systemd|var/lib/systemd|etc/init\.d|etc/rc[0-6S]\.d|etc/init|etc/default/docker$)(/|$)`)
}

const containerdConfig = "etc/containerd/config.toml"

// dockerContainerd leaves out what dockerd has no use for: Kubernetes' interface,
// tracing, and ways to keep layers that need other disks.
const dockerContainerd = `version = 2
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
`
