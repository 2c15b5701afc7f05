// Package proc runs child processes that outlive their parent, and takes them
// up again in a later process.
//
// It owns the start (own session, log pipe), the identity that a reused pid
// cannot fool, the exit seen by pidfd, the stop ladder, and the capped log
// with the child's last words. It never confines a child: internal/host/jail
// does, through Params.Spawn. It never ends a child by itself, except one whose
// start it could not finish.
//
// # The log pipe
//
// A child's standard output and error go to one pipe. The child holds the read
// end of it too, as fd LogFD, and its write end does not block. So
//   - the end of the parent neither kills the child by SIGPIPE nor blocks it,
//   - what nobody reads is bounded by the size of the pipe, the rest is lost,
//   - a later process opens the pipe again through /proc and reads on.
//
// The parent reads through an open file description of its own, so that its
// flags never leak into the child's.
//
// Tested with real children, among them a copy of the test binary that acts as
// the parent which dies.
package proc
