package mapped

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/rootfs"
)

// MaxLength bounds one read, in bytes.
const MaxLength = 64 << 20

// Reader reads files below a root. Safe for concurrent use: there is memory for
// one read at a time, the others wait.
type Reader struct {
	root string
	turn chan struct{}
}

// New returns a Reader of the files below root, which stands for "/".
func New(root string) *Reader { return &Reader{root: root, turn: make(chan struct{}, 1)} }

// Read returns up to length bytes of the file at path from offset on: fewer where
// the file ends, none beyond its end.
func (r *Reader) Read(ctx context.Context, path string, offset, length uint64) ([]byte, error) {
	if !filepath.IsAbs(path) {
		return nil, fault.BadField("path", "must be absolute")
	}
	if length > MaxLength {
		return nil, fault.BadField("length", "exceeds 64 MiB cap")
	}
	select {
	case r.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-r.turn }()
	f, err := r.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := mapFile(f, offset, length)
	if err != nil {
		return nil, fault.New(fault.Internal, "map %s: %w", path, err)
	}
	b := m.copy()
	return b, m.close()
}

func (r *Reader) open(path string) (*os.File, error) {
	f, err := rootfs.Open(r.root, path)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return nil, fault.New(fault.NotFound, "%s: no such file", path)
	case err != nil:
		return nil, fault.New(fault.Precondition, "open %s: %w", path, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		return nil, errors.Join(fault.New(fault.Precondition, "%s: %w", path, err), f.Close())
	}
	return f, nil
}

// mapping is a part of a file. The zero value is a part without bytes.
type mapping struct {
	pages []byte // from the start of a page
	part  []byte // of pages: what was asked for
}

// mapFile maps what the file has of a part.
func mapFile(f *os.File, offset, length uint64) (mapping, error) {
	info, err := f.Stat()
	if err != nil {
		return mapping{}, err
	}
	size := uint64(max(info.Size(), 0))
	if offset >= size || length == 0 {
		return mapping{}, nil
	}
	length = min(length, size-offset)
	lead := offset % uint64(os.Getpagesize())
	pages, err := unix.Mmap(int(f.Fd()), int64(offset-lead), int(lead+length), unix.PROT_READ, unix.MAP_SHARED) //nolint:gosec // below the file's size, which is an int64
	if err != nil {
		return mapping{}, err
	}
	return mapping{pages: pages, part: pages[lead:]}, nil
}

// copy returns what can be read, up to the first page that the file has lost
// since it was mapped.
func (m mapping) copy() []byte {
	page := os.Getpagesize()
	b := make([]byte, len(m.part))
	lead := len(m.pages) - len(m.part)
	for done := 0; done < len(b); {
		n := min(page-(lead+done)%page, len(b)-done)
		if !copyPage(b[done:done+n], m.part[done:]) {
			return b[:done]
		}
		done += n
	}
	return b
}

// copyPage reports whether src could be read.
func copyPage(dst, src []byte) (ok bool) {
	was := debug.SetPanicOnFault(true) // of this goroutine: SIGBUS becomes a panic
	defer debug.SetPanicOnFault(was)
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	copy(dst, src)
	return true
}

func (m mapping) close() error {
	if m.pages == nil {
		return nil
	}
	return unix.Munmap(m.pages)
}
