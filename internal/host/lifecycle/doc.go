// Package lifecycle is the heart of hutchd: it makes, runs, watches and ends
// the sandboxes of a host.
//
// It owns which sandboxes there are and what state each is in. It never talks
// to a VMM, a kernel or a guest by itself: for that it has the interfaces of
// its siblings. What fits which state is said by sandbox.Decide and nowhere
// here.
//
// One goroutine per sandbox, its driver, is the only one that changes it:
//
//	API calls ─┐
//	VMM exits ─┼─► queue ─► driver ─► record on disk ─► published copy ─► event
//	timers    ─┘                                          ▲
//	readers ──────────────────────────────────────────────┘ (never wait)
//
// A destroy is the one thing that does not wait for its turn: it cancels
// whatever the driver is at, a create included, and comes next.
//
// Everything is done in named steps. A step that acquires something pushes its
// undo; when a later one fails, all is taken back, and what could not be taken
// back stays in the record of a broken sandbox for a destroy to try again.
// Records are written before they are shown, and shown before they are told as
// events, so that a hutchd that is killed at any point leaves sandboxes that
// the next one finishes, undoes or adopts (recover.go). Each start tells the
// state of every sandbox anew, so no change is missing from the events for long.
//
// A sandbox need not boot. A machine that stood still (origin.go) can be started
// any number of times: a template that was made warm (warm.go), a snapshot that
// a caller named (named.go), another sandbox at one instant (fork.go), or, once,
// the sandbox's own memory, when it was hibernated (hibernate.go). Those on disk,
// and which of them are in RAM, are the stock (stock.go). A copy of a warm
// template that does not work out becomes a boot; one is kept started ahead
// (spares.go). A memory is marked as used before its processors run, for a second
// use would find a disk that it does not know.
//
// Directories of the host are served to a machine by processes of their own
// (shares.go), which are started before it and ended after it. Part of such a
// machine is outside of its memory: it boots and is never written down, and a
// server that ends is told, not replaced.
//
// Inactivity is counted from the end of the last use, from a resume, from the
// start, from an explicit KeepAlive, or, after a restart of hutchd, from its
// adoption: ActiveAt is kept in memory and written along with other changes
// and once in a while. While a sandbox is paused in RAM the count goes on even
// if a use is in flight, for its guest does nothing.
//
// At the end of inactivity a sandbox is destroyed, paused or hibernated, as its
// spec says (timeout.go). What of that fails is tried again, ever less often. A
// use that is on its way when that begins comes first. Uses of a sandbox that
// sleeps may resume it (awaken.go): the driver does that once for all of them.
//
// Tested on fakes of the host: every cell of the state table, every step of
// every operation broken in turn, a kill of hutchd at every call to the host,
// and many callers at once.
package lifecycle
