// Package sandbox is the vocabulary of hutch: ids, specs, states, records and
// events, and the table that says which request fits which state.
//
// It owns the words and the rules that need no I/O. It never does I/O, holds
// no locks and imports only the standard library, so that every other package
// may import it.
//
// The states and what moves a sandbox between them:
//
//	(none) ──create──► pending ──ready──► running ◄──pause / resume──► paused (in RAM)
//	                     │ a step fails:     │  │                          │
//	                     │ all undone        │  └──────── hibernate ───────┴──► hibernated (on disk, no VM)
//	                     ▼                   │                                     │ resume = restore
//	                  (gone, error told)     ├── guest powered off ──► stopped ────┤ resume = boot from its disk
//	                                         └── VMM or kernel died ─► error  ─────┘ resume = boot from its disk
//	destroy: from every state, preempts everything, idempotent → destroying → (gone)
//	an undo fails → broken, destroy tries again
//
// A boot by resume passes through pending again; when it fails the sandbox
// goes back to error, with its disk.
//
// Tested by a walk over every cell of the table.
package sandbox
