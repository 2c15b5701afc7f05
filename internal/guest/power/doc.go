// Package power ends the machine in order, and gives unused disk blocks back
// while it runs.
//
// It owns the sequence of a shutdown (users' processes, sync, filesystems
// read-only and unmounted, power off) and FITRIM. Whose processes there are and
// how they end is a Stopper's business; who asks, and how the answer travels,
// is the RPC layer's. It never fails to power off because something before it
// failed: by then the host waits for nothing else. Tested with a kernel that
// writes down what it is told, and, as root, with real ext4 filesystems on
// loop devices: a shut-down one is clean, a trimmed one takes less of its host
// file. No test ever powers anything off.
package power
