package server

import "k8s.io/component-base/version"

// Version is the release of Kubernetes that this is.
func Version() string { return version.Get().GitVersion }
