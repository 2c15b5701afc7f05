// Package daemon is hutchd: it builds every part of the host side, runs them,
// and stops them in order.
//
// It owns the configuration, the wiring, and the preparation of a host
// ("hutchd setup"). It is the only package that knows all others, and it
// decides nothing about sandboxes: lifecycle does. Tested by unit tests of its
// configuration, and by test/e2e, which runs the real program.
package daemon
