// Hutch-kube is the Kubernetes that runs inside a sandbox: etcd, API server, controllers, scheduler, kubelet, kube-proxy, cluster DNS, a default storage class
// and kubectl in one static program, made of unmodified upstream modules.
//
// It is a module of its own, so that nothing of it is compiled, vetted or tested with hutch: Kubernetes takes 10 minutes of two processors. build.sh builds it once for
// what it is made of. The image of the template "kubernetes" carries the result, and the file kubernetes.json, which tells hutch's guest agent
// how to run it; hutch knows nothing else of it.
//
// Packages, from the bottom: pki (keys), cni (the network's file), pause (the image of pods' first process), status (how the parts are), reset (what is
// taken away at the end), loop, loadbalancer, storage, dns, probe (the cluster's own parts), bootstrap (their objects), control and node (upstream's parts), and
// server, which puts them together. Only control, node, dns and server need all of Kubernetes to be compiled: tests of the others are cheap. The built program is tried by test.
//
// It must live with being frozen, copied and thawed months later: nothing hangs on the host's name, no timer that was computed long ago decides over
// certificates, and resolv.conf may change under it.
package main
