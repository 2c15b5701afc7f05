package image

import (
	"errors"
	"io"
	"os"
	"syscall"

	"github.com/hutch-run/hutch/internal/fault"
)

// sparseFile writes a new file and leaves holes where whole blocks are zero.
// It does what an io.ReadWriteSeeker over the file would, and finish gives the
// file its length. It keeps its first error. Used by one goroutine.
type sparseFile struct {
	f    *os.File
	pos  int64
	high int64 // nothing was written from here on, so holes are zeros
	err  error
}

const holeBlock = 4096

// Write implements io.Writer.
func (s *sparseFile) Write(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	total := len(p)
	for len(p) > 0 {
		// Up to the next boundary, or as many whole blocks of one sort as there are.
		n := min(holeBlock-int(s.pos%holeBlock), len(p))
		zero := s.pos >= s.high && isZero(p[:n])
		for n < len(p) {
			next := min(holeBlock, len(p)-n)
			if (s.pos+int64(n) >= s.high && isZero(p[n:n+next])) != zero {
				break
			}
			n += next
		}
		if !zero {
			if _, err := s.f.WriteAt(p[:n], s.pos); err != nil {
				s.err = diskError(err)
				return total - len(p), s.err
			}
		}
		s.pos += int64(n)
		s.high = max(s.high, s.pos)
		p = p[n:]
	}
	return total, nil
}

// Read implements io.Reader.
func (s *sparseFile) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	left := s.high - s.pos
	if left <= 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), left)]
	n, err := s.f.ReadAt(p, s.pos)
	if errors.Is(err, io.EOF) { // a hole at the end that has no length yet
		clear(p[n:])
		n, err = len(p), nil
	}
	s.pos += int64(n)
	return n, err
}

// Seek implements io.Seeker.
func (s *sparseFile) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += s.pos
	case io.SeekEnd:
		off += s.high
	}
	if off < 0 {
		return 0, errors.New("seek before the start")
	}
	// The gap that a seek past the end leaves is a hole like any other.
	s.pos = off
	return off, nil
}

// finish gives the file the length that was written, trailing holes included.
func (s *sparseFile) finish() error {
	if s.err == nil {
		s.err = diskError(s.f.Truncate(s.high))
	}
	return s.err
}

// isZero reports whether b is all zero.
func isZero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// diskError classes what a local write can run into.
func diskError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.As(fault.Exhausted, err)
	}
	return err
}
