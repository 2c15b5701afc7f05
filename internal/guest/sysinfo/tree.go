package sysinfo

import (
	"io"

	"github.com/hutch-run/hutch/internal/guest/rootfs"
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

// readFile reads regular files only: reading a FIFO or a device that an image
// put there must not block.
func (t tree) readFile(path string) (string, bool) {
	f, err := rootfs.Open(t.root, path)
	if err != nil {
		return "", false
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return "", false
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFile))
	return string(content), err == nil
}
