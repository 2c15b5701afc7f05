// Package kernel makes and keeps kernel packs: a kernel, its modules as a
// read-only disk, and the initramfs that carries hutch-agent.
//
// It owns <root>/kernels. A pack is made from Debian's cloud kernel, which is
// downloaded and unpacked but never installed, or from a kernel and a modules
// directory that the host has. Packs are content-addressed and immutable; one
// of them is current. When hutch-agent changes, the current pack is made again
// around the same kernel, and templates stay as they are. It never boots
// anything. Packs with other contents live side by side, so a running sandbox
// keeps its own.
//
//	kernels/
//	  current            the id of the current pack
//	  <id>/pack.json     version, id, release, digests
//	  <id>/vmlinux       the ELF kernel, unpacked; or as given, when it is no bzImage
//	  <id>/initrd.cpio   newc: /init (hutch-agent), /dev/console, /modules/NN-name.ko
//	  <id>/boot-modules/ what of the modules is in the initramfs, for the next agent
//	  <id>/modules.ext4  the content of /lib/modules/<release>
//
// Tested by unit tests on made-up module trees, and on the real kernel where
// root and a package mirror are there; every VM test boots a pack.
package kernel
