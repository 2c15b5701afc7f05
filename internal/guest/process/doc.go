// Package process runs the programs of a sandbox's users and keeps hold of
// what they leave behind: output, exit status, and every process they made.
//
// It owns the table of running and lately ended programs, the cgroup of each
// tree, the pipes and terminals, and the retained output. A program's life is
// never tied to a call: callers come and go as subscriptions. It never speaks
// a protocol (processrpc does) and reaps nobody but its own children.
//
// Output. Each stream is read in order into a log that keeps the last part of
// it for callers that come later. What an attached subscription has not taken
// yet is never dropped: reading stops instead, the pipe fills, and the program
// waits. A subscription that holds up a program and takes nothing for
// Params.Stall is cut off with an error; nothing else ever loses output that
// someone asked for. The end of a program is told when its first process has
// ended and everything that its pipes held at that moment was delivered;
// processes left in the background keep running, and what they write
// afterwards is read and dropped, so that they neither block nor die of it.
//
// Trees. With cgroup v2 every program starts inside a cgroup of its own, so a
// kill reaches all that came from it, however often it forked or made new
// sessions. Without cgroup v2 only its process group can be reached, and only
// while the first process lives.
//
// Needs Linux 5.7 (clone into a cgroup, pidfd); the kill of a whole cgroup at
// once needs 5.14, before that the cgroup is frozen and emptied one by one.
// Tested with real processes, as root, and by model tests of the log.
package process
