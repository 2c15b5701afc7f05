// Package image turns what people have into what sandboxes boot from: a
// read-only ext4 file, named by the digest of its bytes.
//
// It reads images from registries, OCI layouts (directories and tars), docker
// save archives and plain root tars, squashes their layers, and writes one
// filesystem image that Linux 6.1 mounts as the lower directory of an overlay.
// The same files give the same bytes, however they were compressed or split
// into layers: entries are written in sorted order and everything that is not
// content (order, compression, sub-second times, uninteresting headers) is
// left out.
//
// It owns <root>/images/<hex digest>/ (rootfs.ext4 and manifest.json, both
// there before the directory gets its name) and a work directory for builds.
// Sources are hostile: nothing of them is ever unpacked to, linked on or
// mounted by the host. File contents go to spool files under names of our own,
// names and owners stay in memory until they are written into the image.
// Memory grows with the number of entries, which is limited, and never with
// their sizes. What is refused, and why, is said in layer.go and tree.go; the
// numbers are in Limits.
//
// It knows nothing of templates: package template gives images their names.
//
// Tested against a registry on the loopback, layouts and archives made by the
// tests, tables of hostile layers, a fuzzed squasher, and the images it writes
// are read back by e2fsck, debugfs and (as root) a loop mount.
package image
