package ram

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	pageSize = 4096
	// chunk is what is read at a time, in bytes.
	chunk = 1 << 20
)

// Bits of an entry of /proc/pid/pagemap, see the kernel's
// admin-guide/mm/pagemap: a page that is there or swapped out and is not the
// file's is the process's own.
const (
	entrySize   = 8
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61
)

// Copy writes the memory into dst, an empty file, and returns how many bytes of
// it are not zero, in whole pages. The others become holes. The guest must not
// run.
func (m *Memory) Copy(ctx context.Context, dst *os.File) (written int64, err error) {
	if err := dst.Truncate(m.size); err != nil {
		return 0, fmt.Errorf("copy memory: %w", err)
	}
	buf := make([]byte, chunk)
	for _, p := range m.parts {
		for done := int64(0); done < p.len; {
			if err := ctx.Err(); err != nil {
				return written, fmt.Errorf("copy memory: %w", err)
			}
			b := buf[:min(chunk, p.len-done)]
			any, err := m.read(b, p, done)
			if err != nil {
				return written, fmt.Errorf("copy memory: %w", err)
			}
			if any {
				n, err := writePages(dst, b, p.at+done)
				written += n
				if err != nil {
					return written, fmt.Errorf("copy memory: %w", err)
				}
			}
			done += int64(len(b))
		}
	}
	return written, nil
}

// read fills b with what the guest has at skip in p. Without any the guest has
// nothing there, and b is not filled.
func (m *Memory) read(b []byte, p part, skip int64) (any bool, err error) {
	at := p.at + skip
	data, err := unix.Seek(int(m.file.Fd()), at, unix.SEEK_DATA)
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return false, fmt.Errorf("look for data: %w", err)
	}
	if any = err == nil && data < at+int64(len(b)); any {
		if _, err := m.file.ReadAt(b, at); err != nil {
			return false, err
		}
	}
	if m.own == nil {
		return any, nil
	}
	entries := make([]byte, len(b)/pageSize*entrySize)
	if _, err := m.pagemap.ReadAt(entries, (p.address+skip)/pageSize*entrySize); err != nil {
		return false, lost(err)
	}
	for i := 0; i < len(b); {
		n := ownRun(entries, i/pageSize) * pageSize
		if n == 0 {
			i += pageSize
			continue
		}
		if !any {
			clear(b)
			any = true
		}
		if _, err := m.own.ReadAt(b[i:i+n], p.address+skip+int64(i)); err != nil {
			return false, lost(err)
		}
		i += n
	}
	return any, nil
}

// ownRun returns how many pages from i on are the process's own.
func ownRun(entries []byte, i int) int {
	n := 0
	for ; (i+n)*entrySize < len(entries); n++ {
		e := binary.NativeEndian.Uint64(entries[(i+n)*entrySize:])
		if e&(pagePresent|pageSwapped) == 0 || e&pageOfFile != 0 {
			break
		}
	}
	return n
}

// lost makes the end of a file of /proc what it means: the process has ended,
// or is about to. It is a fault.Unavailable.
func lost(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EIO) {
		return fault.New(fault.Unavailable, "the process lets go of its memory: %w", err)
	}
	return err
}

// writePages writes the pages of b that are not all zero to at in dst.
func writePages(dst *os.File, b []byte, at int64) (written int64, err error) {
	zero := make([]byte, pageSize)
	for i := 0; i < len(b); {
		n := 0
		for i+n < len(b) && !bytes.Equal(b[i+n:i+n+pageSize], zero) {
			n += pageSize
		}
		if n == 0 {
			i += pageSize
			continue
		}
		w, err := dst.WriteAt(b[i:i+n], at+int64(i))
		written += int64(w)
		if err != nil {
			return written, err
		}
		i += n
	}
	return written, nil
}
