package image

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
)

// spool holds the contents of one layer's files, one behind the other, in a
// file without a name: it is gone when it is closed, even by a kill.
type spool struct {
	f  *os.File
	sf *sparseFile
	bw *bufio.Writer
}

const spoolBuffer = 256 << 10

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, "spool-*")
	if err != nil {
		return nil, fmt.Errorf("make a spool file: %w", diskError(err))
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("unlink a spool file: %w", err), f.Close())
	}
	s := &spool{f: f, sf: &sparseFile{f: f}}
	s.bw = bufio.NewWriterSize(s.sf, spoolBuffer)
	return s, nil
}

// at is the offset of the next byte written.
func (s *spool) at() int64 { return s.sf.pos + int64(s.bw.Buffered()) }

func (s *spool) Write(p []byte) (int, error) { return s.bw.Write(p) }

// reset empties the spool.
func (s *spool) reset() error {
	if err := s.f.Truncate(0); err != nil {
		return err
	}
	*s.sf = sparseFile{f: s.f}
	s.bw.Reset(s.sf)
	return nil
}

// seal makes everything written readable.
func (s *spool) seal() error {
	if err := s.bw.Flush(); err != nil {
		return err
	}
	s.bw = bufio.NewWriterSize(io.Discard, 16) // the buffer's memory is needed no longer
	return s.sf.finish()
}

// open reads size bytes from off.
func (s *spool) open(off, size int64) io.Reader { return io.NewSectionReader(s.f, off, size) }

func (s *spool) close() error { return s.f.Close() }
