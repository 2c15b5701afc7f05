// Package rootfs opens files of the guest as the guest sees them.
//
// It owns one way to open a path below a directory that stands for "/". It
// never writes, never leaves that directory, and never waits, whatever an image
// or a user put at the path: a FIFO or a device opens at once, and it is for
// the caller to look at what it has before it reads. Tested by its own unit
// tests, and with the hostile trees of the packages that use it.
package rootfs

import (
	"os"

	"golang.org/x/sys/unix"
)

// Open opens path below root for reading. Symlinks on the way are resolved as
// if root were "/", the kernel's magic ones not at all. Errors are of the
// system, without the path.
func Open(root, path string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(dir, path, &how)
		if err == unix.EINTR || err == unix.EAGAIN { // EAGAIN: a rename elsewhere raced with the walk
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}
