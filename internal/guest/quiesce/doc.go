// Package quiesce holds a guest still while it is copied.
//
// It owns the stillness: no new programs, all programs frozen, the data disk
// written back; and its end, which is Wake's, after the guest was configured
// for what it is from then on. It never knows whether this guest is the
// original or a copy (at the instant of the copy they are the same), and never
// configures anything itself.
//
// What is frozen is every cgroup of the top but the agent's own: containers
// that programs started are not below the programs' group. Groups that somebody
// had frozen already are left alone, then and at the end. A process that root
// moved into the agent's group, or into none, is not stopped.
//
// A guest whose host died must not be still for ever, and a copy must not wake
// before it was configured. The guest's monotonic clock can't tell them apart:
// in both it goes on from the instant. So time alone is not asked, but who is
// there: the host is connected at the instant, by the word of the port, and
// comes to a copy at once; only after lonely without any host, seen while the
// clock runs, the guest wakes by itself, and at the latest after patience, which
// no start of a copy lasts.
//
// What is frozen is noted in a file on a tmpfs, so that a server which is
// started again after a crash finds itself still.
//
// Tested as root with real processes in real cgroups.
package quiesce
