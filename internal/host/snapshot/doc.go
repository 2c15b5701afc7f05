// Package snapshot keeps what a microVM was at one instant: its memory, the
// state of its devices and its data disk, on disk and so that not one wrong bit
// gets back into a guest.
//
// It owns the format of a snapshot's directory, its digests, its publication by
// one rename, and the sealed memory that clones map. It never talks to a VMM or
// a guest, and never decides what is snapshotted or thrown away: package
// lifecycle does, and says which snapshots are in use.
//
// # A directory
//
//	manifest.json   what it is; see Manifest
//	state           the VMM's own description of all devices
//	memory          the guest's memory, holes where it is zero
//	data            the data disk at the same instant; absent where the
//	                sandbox's own disk is the one (hibernation)
//
// A directory is written under a name that no reader looks at, every file
// synced, the manifest last, and appears by one rename. From then on nothing in
// it changes; it disappears by a rename to the trash.
//
// # What is checked when
//
// Open reads the manifest and compares it with itself and with the sizes of the
// parts: that is cheap, and done at every use. What a guest is to see is
// checked in full while it is brought in: state and data disk at every use,
// memory when it is read into the sealed memory file, which nobody can change
// after that. Verify reads everything.
//
// # Digests
//
// The digest of a part is SHA-256 over "hutch-sparse-1\n", the part's length
// (8 bytes, big-endian), and for every chunk of 1 MiB that is not all zero, in
// order, its number (8 bytes) and the SHA-256 of its bytes. Whether zeros are
// stored or are holes makes no difference, and chunks can be hashed side by
// side.
//
// Tested by unit tests: a bit flipped in any part, a cut part, a manifest of
// another version, a kill between any two steps of publication.
package snapshot
