// Package store keeps the records of sandboxes as files: one directory per
// sandbox is the database.
//
// It owns the layout of a root directory, the lock that gives a root to one
// hutchd at a time, and the rule that everything appears by rename of a
// finished, fsynced thing and disappears by rename to the trash:
//
//	<root>                     0711
//	  lock                     0600  flock; holds the pid of the owner
//	  sandboxes/               0700
//	    <id>/                  0700
//	      record.json          0600  sandbox.Record, versioned
//	      data.img                   data disk        (made by others)
//	      console.log vmm.log        logs             (made by others)
//	    .new-<id>/                   a sandbox that never came to be
//	  events/                  0700  (kept by package events)
//	  blank/                   0700  (kept by package disk)
//	  trash/                   0700
//	    sandbox.<id>.<nonce>/        removed, not deleted yet
//	    ...                          (kept by packages image and template)
//
// Nothing below sandboxes can be opened by a VMM's user through its path:
// VMMs get their disks and logs as open files.
//
// It never decides what a record says, and it never deletes what it cannot
// read: a record that is unreadable or newer than this build puts that one
// sandbox in quarantine.
//
// Tested by its own unit tests: a stop is simulated between all steps of every
// write, a writing process is killed in a loop, and a full file system leaves
// the old record whole.
package store
