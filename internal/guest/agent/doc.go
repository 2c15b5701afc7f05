// Package agent is the server inside a sandbox, the child of PID 1: it puts
// the guest's services together and serves them on the link.
//
// It owns the wiring, and the file that hands what the host configured to a
// server that is started again after a crash. It never boots the machine
// (package boot does) and listens on nothing but the link. Tested by every VM
// test.
package agent
