// Package clock keeps the guest's wall clock with the host's.
//
// It owns the decision what to do about a difference (nothing, slew, step; in
// a guest that is held still: nothing, step),
// and the system calls that do it. It never asks anybody for the time: the
// host tells it with every Ping and Configure. How the host's time travels is
// not its concern either. Tested over every cell of the decision, and against
// a kernel that only pretends: the clock of the machine that runs the tests is
// never touched.
package clock
