package files

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
)

// maxListBytes bounds a listing so that its message stays below rpcx's limit.
const maxListBytes = 12 << 20

// Stat describes what is at path. A link is described itself, see Type.
func (v View) Stat(path string) (Entry, error) {
	abs, err := v.resolve("path", path, true)
	if err != nil {
		return Entry{}, err
	}
	return v.entry(abs)
}

func (v View) entry(abs string) (e Entry, err error) {
	names := v.store.params.Accounts.Names()
	err = v.do(abs, func() error {
		e, err = entryAt(abs, names)
		return err
	})
	return e, err
}

// List describes what is in a directory and, with depth above 1, in the
// directories below it, parents before children, names in order. Depth 0 means
// 1. Links to directories are not entered. What vanishes meanwhile, or can't
// be read by the user below the first level, is left out.
func (v View) List(path string, depth int) ([]Entry, error) {
	abs, err := v.resolve("path", path, true)
	if err != nil {
		return nil, err
	}
	l := lister{base: abs, names: v.store.params.Accounts.Names(), left: v.store.params.MaxEntries, room: maxListBytes}
	err = v.do(abs, func() error {
		root, err := openRoot(abs)
		if err != nil {
			return err
		}
		defer root.Close()
		return l.list(root, ".", max(depth, 1))
	})
	return l.entries, err
}

// openRoot is os.OpenRoot with the system's error for what is no directory.
func openRoot(path string) (*os.Root, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.IsDir() {
		return nil, unix.ENOTDIR
	}
	return os.OpenRoot(path)
}

type lister struct {
	base    string
	names   *account.Names
	entries []Entry
	left    int // entries
	room    int // bytes
}

func (l *lister) list(root *os.Root, dir string, depth int) error {
	children, err := readNames(root, dir, l.left)
	if dir != "." && gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range children {
		rel := filepath.Join(dir, name)
		info, err := root.Lstat(rel)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		e := describe(filepath.Join(l.base, rel), info, l.names)
		l.left--
		l.room -= len(e.Path) + len(e.Name) + len(e.Target) + 128
		if l.left < 0 || l.room < 0 {
			return fault.New(fault.Exhausted, "path %s holds more than one listing takes: list with less depth, or a part of it", quote(l.base))
		}
		l.entries = append(l.entries, e)
		if info.IsDir() && depth > 1 {
			if err := l.list(root, rel, depth-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// gone tells the errors that a living tree brings about below its first level.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENOTDIR)
}

// readNames returns the names in a directory in order, a little more than
// limit of them at most.
func readNames(root *os.Root, dir string, limit int) ([]string, error) {
	f, err := root.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var names []string
	for len(names) <= limit {
		batch, err := f.Readdirnames(1024)
		names = append(names, batch...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(names)
	return names, nil
}

// MakeDir makes a directory and its missing parents. One that exists is an
// Exists error.
func (v View) MakeDir(path string) (Entry, error) {
	abs, err := v.resolve("path", path, false)
	if err != nil {
		return Entry{}, err
	}
	err = v.do(abs, func() error {
		if info, err := os.Stat(abs); err == nil && !info.IsDir() {
			return fault.BadField("path", "%s exists and is not a directory", quote(abs))
		} else if err == nil {
			return unix.EEXIST
		}
		if err := makeParents(abs); err != nil {
			return err
		}
		return os.Mkdir(abs, 0o755)
	})
	if err != nil {
		return Entry{}, err
	}
	return v.entry(abs)
}

// makeParents makes the directories above path. It runs with the user's
// rights, so they are the user's.
func makeParents(path string) error {
	return os.MkdirAll(filepath.Dir(path), 0o755)
}

// Move renames a file or a directory, making missing parents of the new place.
// A file there is replaced. Both must be on one filesystem.
func (v View) Move(source, destination string) (Entry, error) {
	from, err := v.resolve("source", source, false)
	if err != nil {
		return Entry{}, err
	}
	to, err := v.resolve("destination", destination, false)
	if err != nil {
		return Entry{}, err
	}
	err = v.do(from, func() error {
		if _, err := os.Lstat(from); err != nil {
			return err
		}
		return v.explain(to, makeParents(to))
	})
	if err != nil {
		return Entry{}, err
	}
	err = v.do(to, func() error {
		err := unix.Rename(from, to)
		if errors.Is(err, unix.EINVAL) {
			return fault.BadField("destination", "%s is inside of the directory to be moved", quote(to))
		}
		if errors.Is(err, unix.ENOTEMPTY) {
			return unix.EEXIST
		}
		return err
	})
	if err != nil {
		return Entry{}, err
	}
	return v.entry(to)
}
