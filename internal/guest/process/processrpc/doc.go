// Package processrpc serves process.Process, wire-compatible with E2B's guest
// protocol, on top of the package process.
//
// It owns the conversion between messages and domain types, keep-alives, and
// what a request's deadline means: for Start it is the time limit of the
// program, not of the call. It decides nothing else. Tested through generated
// clients over a real HTTP server.
//
// Deadlines. connect would cut the call off at the deadline that the request
// brings along, and the last output and the End with it. Mount therefore takes
// the deadline of Start out of the request; the program is killed a little
// before it (a tenth of the time, at most 500 ms), so that the End can still
// reach the client. A client that leaves ends its call, never the
// program.
package processrpc
