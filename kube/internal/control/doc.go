// Package control runs the cluster's control plane: etcd, the API server, the controllers and the scheduler, of unmodified upstream modules, in this
// process.
//
// Each runs until its context ends. It knows the settings of each and nothing of their order, which is package server's. Three things are
// not as upstream's commands have them: nothing takes signals, the controller manager's options are made before all others (they
// change a feature gate's default, which panics later), and controllers may ask the API as fast as they like: with 20 requests a second, what each needs for its own
// service account delays the first default service account by 5 s.
package control
