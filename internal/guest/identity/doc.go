// Package identity makes a guest the sandbox that its host says it is.
//
// It owns the hostname, machine-id, hosts and resolv.conf, the address of
// eth0, the fresh entropy, and the defaults (environment, user, directory) of
// every command. One call sets all of it, the same after a cold boot and after
// a restore, when the guest wakes up with the identity of the sandbox that the
// snapshot was taken of; repeating it changes nothing. A copy of a running guest is also given a boot id,
// which programs read in the place of the kernel's.
//
// It never overwrites a file of the image that says something: hosts and
// resolv.conf are written only where they are missing, blank or dangling
// symlinks, and where hutch wrote them before, which a marker in the first
// line tells. A dangling symlink (images point resolv.conf to a directory of
// systemd-resolved, which does not run here) is replaced by a file: its target
// may lie on a filesystem that is mounted later. What can't be written is a
// warning; what makes a sandbox unsafe or unusable (entropy, hostname,
// network) is an error.
//
// Tested against made-up trees and a pretended kernel, and, as root, in a
// network and a UTS namespace of its own.
package identity
