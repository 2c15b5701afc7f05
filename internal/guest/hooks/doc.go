// Package hooks runs what an image wants done in every copy of a guest before
// its programs go on: new host keys, caches to be dropped, a seed to be given
// away.
//
// Hooks are the executable files of one directory, run as root one after the
// other in the order of their names. It owns their choice, their time and what
// is told of them; it never decides when they run. Programs of the sandbox are
// frozen meanwhile: a hook that waits for one runs out of time, a signal that it
// sends arrives afterwards. What a hook leaves running ends with the last hook.
// A hook that fails is told of and stops nothing. All of them may run again,
// when the host had to repeat the call.
//
// What somebody else than root could have written is not run.
//
// Tested with real scripts, as root, in a cgroup of the test's own.
package hooks
