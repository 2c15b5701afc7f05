// Package reset takes away what a cluster leaves on its machine when its server has ended, however that came about.
//
// That is: pods and their containers in containerd's namespace k8s.io, shims that no containerd knows, the cgroup of pods, mounts below the
// kubelet's and the cluster's directories, network namespaces, the bridge of pods and its addresses, and the rules of kube-proxy, kubelet and the CNI plugins.
// It keeps the cluster's data, its keys and containerd's images. It touches nothing of Docker: rules are told apart by the names of their chains.
//
// Every step is tried, whatever became of the others, and done again it finds nothing to do. What could not be taken away is told. The order matters: as long as
// a process of a pod lives, its mounts and cgroups are busy.
//
// The machine is behind an interface; tests use a fake one. The real one is tried in a VM.
package reset
