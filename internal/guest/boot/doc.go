// Package boot is PID 1 of a sandbox: it brings the machine up from the
// initramfs, starts the agent's server as its child, reaps what nobody waits
// for, starts the server again when it dies, and never ends.
//
// It owns the mounts, the overlay root and the restart of the server. It never
// formats a disk, never serves a request, and holds no state that a crash of
// the server could lose. A step that panics is an error of that step, not the
// end of the machine.
//
// Boot is a table of steps, in three parts: stage one runs in the initramfs and
// ends with the overlay as "/"; stage two is the rest of what the server needs;
// stage three, what programs need, runs while the server already meets the host
// and is told who it is. The server opens its API when all are over, so nothing
// that a caller starts can be early. A step that fails stops the boot if the
// machine is useless without it: the reason goes to the console, where the host
// reads it, and the machine powers off.
//
// Disks are found by their virtio serial: "root" (the image, read-only),
// "data" (ext4, writable), "modules" (kernel modules, read-only). A data disk
// that holds no ext4 filesystem is an error and is left as it is.
//
// Tested by unit tests of its parts and by every VM test.
package boot
