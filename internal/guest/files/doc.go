// Package files looks at, changes, moves and watches the files of a guest on
// behalf of one of its users.
//
// It owns the rule that every operation has that user's rights and no more:
// each runs with the user's file identity (account.User.Do), so the kernel
// itself checks every path, and what is created belongs to the user. Beyond
// that it owns whole-file uploads (a temporary file beside the target, renamed
// when complete), holes in both directions, tar streams of trees, and watches.
// It never speaks a protocol (filesrpc does), never holds a file in memory and
// never follows a link out of a tree that it packs, unpacks or removes.
// Tested as root against real filesystems, links that are swapped meanwhile
// among them.
package files
