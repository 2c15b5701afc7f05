// Package kubernetes makes a guest a cluster of one node when it is asked to,
// and makes it none again.
//
// It owns the lifecycle of the distribution that the image brings: starting it
// under the supervisor, asking its API how it is, ending it with everything
// that it started, wiping its state. The distribution itself is data, see
// Distribution: this package knows no flag of any. It never speaks for the host:
// which of its ports lead here is told by others.
//
// Nothing of a cluster hangs on the name of the guest, and its address is on an
// interface of its own, so a copy of a guest with a running cluster goes on
// without being told.
//
// Tested against a made-up distribution (the test binary itself, which serves
// an API that is slow, crashes or does not stop), and with the real one by
// test/e2e.
package kubernetes
