// Package supervise keeps the services of a sandbox running: containerd,
// dockerd, a cluster.
//
// It owns their processes: when they start and in which order, the cgroup they
// are in, what they write, what is done when they end, and how they are
// stopped. It knows nothing of what a service is: a Unit says that, as data. It
// never starts anything that nobody asked for, and never takes a process that
// answers slowly for one that has ended.
//
// A unit has one goroutine while somebody wants it. It starts what the unit
// needs and waits until that is ready, prepares, starts the program, asks it
// until it is ready, and waits for its end. A program that ends without having
// been asked to is started again: at once after the first crash of something
// that was ready, later and later when that does not help (see backoff).
// Units that need it go on meanwhile: their programs know how to connect again.
//
// The agent's server may crash; the services may not notice. Each program's pid
// and start time are noted in a file on a tmpfs, its output goes to a FIFO that
// it holds open in both directions itself, so it never meets a broken pipe. The
// next server defines the same units and finds their programs by the notes. It
// can watch them but not wait for them, so how they ended is not known then.
//
// Nothing here takes processor time while all is well: a machine with services
// is copied like any other, and its copies find them as they were.
//
// Tested as root with real processes in real cgroups.
package supervise
