// Package vmmtest is what every vmm.Driver must pass, the fake included.
//
// It owns the behaviours, the guest that they are tested with (guestinit, in
// an initramfs made here) and the way to talk to it (testguest). It never
// knows a driver: what differs between them is in a Harness. It is tested by
// being run.
package vmmtest
