// Package disk makes the writable disks of sandboxes.
//
// It owns the blank images, one per size, formatted once and then cloned, and
// the copying of disk images: by reflink where the file system can, else with
// all holes kept, so that a copy takes no more room than its source.
//
// It formats only files that it has just made itself and found without any
// data. It never opens what a guest has written for anything but copying it.
//
// Tested by its own unit tests, with e2fsck as the judge.
package disk
