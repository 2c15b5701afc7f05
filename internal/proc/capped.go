package proc

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
)

// DefaultLogMax is the size of a capped log, both files together, in bytes.
const DefaultLogMax = 2 << 20

// oldSuffix names the older half of a capped log.
const oldSuffix = ".1"

// CappedFile is an append-only log that never grows beyond a size. It is kept
// in two files: when path reaches half of the size it becomes path.1, replacing
// the one before, and path starts anew; so at least the last half of the size is there.
//
// A log must never harm what it watches: Write takes every byte, also when the
// disk is full, and Err tells later what was lost. It is safe for concurrent
// use.
type CappedFile struct {
	path string
	half int64

	mu   sync.Mutex
	f    *os.File // nil: to be opened; guarded by mu
	size int64    // of f; guarded by mu
	lost int64    // bytes; guarded by mu
	err  error    // the first; guarded by mu
	done bool     // guarded by mu
}

// CreateCapped opens the log at path for appending, making it with mode 0600
// when it is not there. max is the size of both files together, in bytes; 0
// means DefaultLogMax.
func CreateCapped(path string, max int64) (*CappedFile, error) {
	if max <= 0 {
		max = DefaultLogMax
	}
	c := &CappedFile{path: path, half: (max + 1) / 2}
	if err := c.openLocked(); err != nil {
		return nil, err
	}
	return c, nil
}

// openLocked opens the file. The name is not followed when it is a symbolic
// link.
func (c *CappedFile) openLocked() error {
	f, err := os.OpenFile(c.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|noFollow, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("open log: %w", err)
	}
	if !st.Mode().IsRegular() {
		f.Close()
		return fmt.Errorf("open log %s: not a regular file", c.path)
	}
	c.f, c.size = f, st.Size()
	return nil
}

// Write appends p. It always reports success.
func (c *CappedFile) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := len(p)
	for len(p) > 0 {
		n, err := c.writeLocked(p)
		p = p[n:]
		if err != nil {
			c.lost += int64(len(p))
			if c.err == nil {
				c.err = err
			}
			break
		}
	}
	return all, nil
}

// writeLocked appends as much of p as fits the file.
func (c *CappedFile) writeLocked(p []byte) (int, error) {
	if c.done {
		return 0, fs.ErrClosed
	}
	if c.f != nil && c.size >= c.half {
		err := errors.Join(c.f.Close(), os.Rename(c.path, c.path+oldSuffix))
		c.f = nil
		if err != nil {
			// Without a rename there is no room: start anew in place.
			err = errors.Join(err, os.Truncate(c.path, 0))
			if c.err == nil {
				c.err = err
			}
		}
	}
	if c.f == nil {
		if err := c.openLocked(); err != nil {
			return 0, err
		}
	}
	n, err := c.f.Write(p[:min(int64(len(p)), max(c.half-c.size, 0))])
	c.size += int64(n)
	return n, err
}

// Err tells how many bytes were lost, and why the first of them. Nil: none.
func (c *CappedFile) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		return nil
	}
	return fmt.Errorf("log %s lost %d bytes: %w", c.path, c.lost, c.err)
}

// Close closes the file. It is idempotent; later writes are lost.
func (c *CappedFile) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = true
	if c.f == nil {
		return nil
	}
	err := c.f.Close()
	c.f = nil
	return err
}

// OpenCapped opens both files of a capped log for reading, the older one
// first. It is fs.ErrNotExist when there is neither.
func OpenCapped(path string) (io.ReadCloser, error) {
	var files []*os.File
	for _, p := range []string{path + oldSuffix, path} {
		f, err := os.OpenFile(p, os.O_RDONLY|noFollow, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, fmt.Errorf("open log: %w", err)
		}
		files = append(files, f)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("open log %s: %w", path, fs.ErrNotExist)
	}
	return &cappedReader{files: files}, nil
}

type cappedReader struct{ files []*os.File }

// Read reads the files one after the other.
func (r *cappedReader) Read(p []byte) (int, error) {
	for len(r.files) > 0 {
		n, err := r.files[0].Read(p)
		if err != io.EOF || n > 0 {
			return n, err
		}
		if len(r.files) == 1 {
			return 0, io.EOF
		}
		r.files[0].Close()
		r.files = r.files[1:]
	}
	return 0, io.EOF
}

// Close closes what is open still.
func (r *cappedReader) Close() error {
	var errs []error
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	r.files = nil
	return errors.Join(errs...)
}
