// Package share serves directories of the host to sandboxes, by a virtiofsd for
// each.
//
// It owns which directories may be shared, whom a daemon acts as, its command
// line and its jail. It never knows a VMM, which gets the connection to a daemon
// as an open file, and never what a sandbox is otherwise.
//
// A directory is opened once. What was opened is what is looked up in the list of
// the allowed ones, and what the daemon gets: no path is followed a second time.
// The daemon sees that directory, the system's programs read-only, and itself;
// it has a network without interfaces and capabilities in a user namespace of its
// own only. On the host it acts as the owner of the directory, never as root, and
// what programs of a guest with other ids own has ids that no user has.
//
// A daemon is not tied to the life of hutchd. It ends with the connection to its
// VMM, and is ended for certain with the sandbox. It cannot be started again for
// a running machine, since QEMU does not connect again.
//
// Tested as root with the real daemon, and by VM tests.
package share
