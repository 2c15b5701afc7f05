package fake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	pageSize      = 4096
	chunk         = 1 << 20 // what is copied at a time
	sizeSeals     = unix.F_SEAL_GROW | unix.F_SEAL_SHRINK
	templateSeals = sizeSeals | unix.F_SEAL_WRITE
)

// RAM is a machine's memory. It is safe for concurrent use.
type RAM struct {
	size int64

	mu   sync.Mutex
	file *os.File         // the machine's own, or a template; guarded by mu
	own  map[int64][]byte // pages written since, when file is a template; guarded by mu
}

// newRAM returns memory that is all zero.
func newRAM(size int64) (*RAM, error) {
	fd, err := unix.MemfdCreate("fake", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "fake")
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("make memory: %w", err), f.Close())
	}
	return &RAM{size: size, file: f}, nil
}

// openRAM returns memory that was saved, with a duplicate of its file.
func openRAM(f *os.File, size int64, shared bool) (*RAM, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("take over memory: %w", err)
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	switch {
	case err != nil:
		return nil, fmt.Errorf("take over memory: not a memory file: %w", err)
	case fi.Size() != size:
		return nil, fmt.Errorf("take over memory: it has %d bytes, the machine %d", fi.Size(), size)
	case shared && seals&unix.F_SEAL_WRITE != 0:
		return nil, errors.New("take over memory: it is sealed against writing")
	case !shared && seals&templateSeals != templateSeals:
		return nil, errors.New("share memory: it is not sealed")
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("take over memory: %w", err)
	}
	r := &RAM{size: size, file: os.NewFile(uintptr(fd), "fake")}
	if !shared {
		r.own = map[int64][]byte{}
	}
	return r, nil
}

// ReadAt is io.ReaderAt.
func (r *RAM) ReadAt(p []byte, at int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.readLocked(p, at)
}

func (r *RAM) readLocked(p []byte, at int64) (int, error) {
	n, err := r.file.ReadAt(p, at)
	for i := int64(0); i < int64(n); {
		page, skip := (at+i)/pageSize, (at+i)%pageSize
		if b := r.own[page]; b != nil {
			copy(p[i:n], b[skip:])
		}
		i += pageSize - skip
	}
	return n, err
}

// WriteAt is io.WriterAt.
func (r *RAM) WriteAt(p []byte, at int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if at < 0 || at+int64(len(p)) > r.size {
		return 0, errors.New("write memory: beyond its end")
	}
	if r.own == nil {
		return r.file.WriteAt(p, at)
	}
	for done := 0; done < len(p); {
		page, skip := (at+int64(done))/pageSize, (at+int64(done))%pageSize
		if r.own[page] == nil {
			b := make([]byte, pageSize)
			if _, err := r.file.ReadAt(b, page*pageSize); err != nil {
				return done, err
			}
			r.own[page] = b
		}
		done += copy(r.own[page][skip:], p[done:])
	}
	return len(p), nil
}

// copyTo writes all pages that are not zero into an empty file, and returns how
// many bytes that were.
func (r *RAM) copyTo(ctx context.Context, dst *os.File) (written int64, err error) {
	if err := dst.Truncate(r.size); err != nil {
		return 0, fmt.Errorf("copy memory: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	buf, zero := make([]byte, chunk), make([]byte, pageSize)
	for at := int64(0); at < r.size; at += chunk {
		if err := ctx.Err(); err != nil {
			return written, fmt.Errorf("copy memory: %w", err)
		}
		n, err := r.readLocked(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return written, fmt.Errorf("copy memory: %w", err)
		}
		for i := 0; i < n; i += pageSize {
			page := buf[i : i+pageSize]
			if bytes.Equal(page, zero) {
				continue
			}
			w, err := dst.WriteAt(page, at+int64(i))
			written += int64(w)
			if err != nil {
				return written, fmt.Errorf("copy memory: %w", err)
			}
		}
	}
	return written, nil
}

func (r *RAM) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.file.Close()
}
