// Package cli is the hutch command: what people type.
//
// It owns the words of the command line, the terminal, and the exit codes. It
// talks to hutchd through the public API only, so everything it can do, any
// client can do; it never looks at the host's files or processes. It builds on
// Linux and macOS.
//
// Exit codes are docker's: the guest's own, or 125 when hutch failed, 126 when
// the program could not be run, 127 when it was not found; 124, as timeout(1),
// when the time limit ended it.
//
// Tested by unit tests against an in-process server, and by the scripts in
// test/e2e against real sandboxes.
package cli
