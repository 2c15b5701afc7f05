package sysinfo

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of one file, in bytes.
const maxFile = 64 << 10

// tree reads files below a directory that stands for "/".
type tree struct{ root string }

func (r Reader) tree() tree {
	if r.Root == "" {
		return tree{root: "/"}
	}
	return tree{root: r.Root}
}

// readFirst returns the content of the first of paths that can be read.
func (t tree) readFirst(paths ...string) string {
	for _, p := range paths {
		if s, ok := t.readFile(p); ok {
			return s
		}
	}
	return ""
}

// read returns the first 64 KiB of a file; nothing when it can't be read.
func (t tree) read(path string) string {
	s, _ := t.readFile(path)
	return s
}

// readFile follows symlinks as if the root were "/", and reads regular files
// only: opening a FIFO or a device that an image put there must not block.
func (t tree) readFile(path string) (string, bool) {
	root, err := unix.Open(t.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	defer unix.Close(root)
	fd, err := openIn(root, path)
	if err != nil {
		return "", false
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return "", false
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFile))
	return string(content), err == nil
}

// openIn opens path below the directory root for reading.
func openIn(root int, path string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(root, path, &how)
		// EAGAIN: a rename elsewhere raced with the walk.
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}
