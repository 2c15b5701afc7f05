// Package server puts the cluster together: it is the only place that knows all parts, their order and their files.
//
// Start: the lock, keys, etcd, the API, its own objects, then everything else side by side. Stop: everything else, the API, etcd; then the process
// becomes reset, which ends the pods: a kubelet can't be ended otherwise, and would start them again. If a part ends by itself the process ends with an error and leaves
// the pods alone; the next server finds them.
//
// It owns the data directory. What it needs of the machine is there already: containerd, kernel modules, the node's address.
package server
