// Package mapped reads files of the guest through shared mappings, which is what
// makes the kernel map pages of a filesystem that lives on the host.
//
// It owns one read at a time: bounded, of regular files only, and short where the
// file ends. It never writes, and never lets a file that shrinks while it is
// mapped end the agent: the page that is gone is where the read ends.
//
// Tested with files of all awkward lengths, and with one that is cut while it is
// mapped.
package mapped
