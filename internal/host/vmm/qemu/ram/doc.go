// Package ram is where guests' memory lies: files in RAM without a name
// (memfd_create(2)) that a VMM maps, shared when it is the guest's own, as a
// private copy on write when it is a template's.
//
// It owns how such a file must be made so that no VMM can harm another one or
// hutchd by it, and how a guest's memory is read out of the VMM's process. It
// never starts or stops a process: who reads memory keeps its guest still.
//
// # Facts that the code relies on
//
//   - A VMM opens its file anew, as its own user: the file's mode decides, and
//     for a template the seals, which hold for every user.
//   - hutchd keeps no file of a machine open, so memory goes with its process.
//     It is found again through /proc: the mapping tells the file.
//   - A hostile VMM decides what /proc shows of it. A file is looked at without
//     opening it, and only a memory file whose size is sealed is ever read:
//     that rules out devices, other programs' files, and a file cut short under
//     the reader. What else it forges is its own guest's memory.
//   - Of a private mapping /proc/<pid>/pagemap tells which pages are the
//     guest's own; all others are the template's. A hole must not be read
//     through the mapping: that would fill the template's file, which costs
//     memory even where it cannot change it.
//
// Tested with mappings of the test's own process; needs root.
package ram
