package files

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxDepth bounds how deep Remove, Pack and watches go: each level costs an
// open descriptor or stack.
const maxDepth = 1024

// Remove deletes what is at path, a directory with everything in it. What does
// not exist is removed already. It does not enter other filesystems: a mount
// point is refused, with what was not deleted before it left in place.
func (v View) Remove(path string) error {
	abs, err := v.resolve("path", path, false)
	if err != nil {
		return err
	}
	if abs == "/" {
		return fault.BadField("path", "'/' can't be removed")
	}
	return v.do(abs, func() error {
		dir, err := openPath(unix.AT_FDCWD, filepath.Dir(abs), unix.O_DIRECTORY, 0)
		if err == nil {
			defer unix.Close(dir)
			err = v.removeAt(dir, filepath.Base(abs), abs, 0)
		}
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
}

// removeAt deletes name in the open directory dir. Every step starts at an
// open directory and follows no link, so swapping parts of the tree meanwhile
// leads nowhere else.
func (v View) removeAt(dir int, name, shown string, depth int) error {
	if depth > maxDepth {
		return fault.New(fault.Invalid, "path %s is nested more than %d deep", quote(shown), maxDepth)
	}
	err := unix.Unlinkat(dir, name, 0)
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return v.removeError(shown, err)
	}
	sub, oerr := openPath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, unix.RESOLVE_NO_XDEV|unix.RESOLVE_BENEATH)
	switch {
	case errors.Is(oerr, unix.EXDEV):
		return fault.New(fault.Precondition, "path %s is a mount point: unmount it first", quote(shown))
	case errors.Is(oerr, unix.ENOTDIR) || errors.Is(oerr, unix.ELOOP):
		return v.removeError(shown, err) // a file that may not be unlinked
	case errors.Is(oerr, unix.EACCES):
		// An unreadable directory may still be empty.
		return v.removeError(shown, unix.Unlinkat(dir, name, unix.AT_REMOVEDIR))
	case oerr != nil:
		return v.removeError(shown, oerr)
	}
	f := os.NewFile(uintptr(sub), name)
	defer f.Close()
	if err := v.empty(f, shown, depth); err != nil {
		return err
	}
	return v.removeError(shown, unix.Unlinkat(dir, name, unix.AT_REMOVEDIR))
}

// empty deletes all that is in dir. Deleting while reading may skip names, so
// it reads again until a whole pass finds nothing.
func (v View) empty(dir *os.File, shown string, depth int) error {
	for {
		if _, err := dir.Seek(0, 0); err != nil {
			return err
		}
		found := 0
		for {
			names, _ := dir.Readdirnames(256)
			if len(names) == 0 {
				break
			}
			found += len(names)
			for _, name := range names {
				err := v.removeAt(int(dir.Fd()), name, strings.TrimSuffix(shown, "/")+"/"+name, depth+1)
				if err != nil && !errors.Is(err, unix.ENOENT) {
					return err
				}
			}
		}
		if found == 0 {
			return nil
		}
	}
}

// removeError names the path that could not be deleted, which may lie deep
// below the one asked for.
func (v View) removeError(shown string, err error) error {
	if errors.Is(err, unix.ENOENT) {
		return err
	}
	return v.explain(shown, err)
}

// openPath is openat2 where there is one need for it: RESOLVE flags; plain
// openat else.
func openPath(dir int, path string, flags int, resolve uint64) (int, error) {
	for {
		var fd int
		var err error
		if resolve == 0 {
			fd, err = unix.Openat(dir, path, flags|unix.O_CLOEXEC, 0)
		} else {
			fd, err = unix.Openat2(dir, path, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve})
		}
		// openat2 gives EAGAIN when a rename got in its way.
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}
