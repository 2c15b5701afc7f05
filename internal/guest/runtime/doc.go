// Package runtime is Docker inside a sandbox: containerd and dockerd, started
// by the first who asks for them.
//
// It owns the two units, what they need of the kernel, their configuration, and
// the answers to EnsureRuntime and GetRuntimeStatus. It never downloads
// anything: the programs are the image's, and what is missing is named. It
// never writes into the image's /etc: an own /etc/docker/daemon.json or
// /etc/containerd/config.toml of the image is read, and counts. Which process
// runs when is package supervise's affair; Kubernetes uses the same containerd.
//
// Whether the runtime is ready is asked of the daemons themselves, whoever
// started them: containerd by its health service, dockerd by /_ping, since its
// socket takes connections long before it answers. An answer counts for a
// moment only, and not beyond the death of the process that gave it.
//
// Containers outlive dockerd (live-restore) and containerd (their shims). When
// the machine ends they must not: dockerd is told so before it is stopped, and
// then ends each container as that wants it.
//
// Tested with small programs that play the daemons, and in virtual machines
// with the real ones.
package runtime
