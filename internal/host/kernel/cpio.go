package kernel

import (
	"fmt"
	"io"
)

// cpioWriter writes the newc format of cpio(5), with every owner root and
// every time zero, so that the same entries give the same bytes.
type cpioWriter struct {
	w   io.Writer
	ino uint32
	err error
}

// cpioEntry is one entry. Size bytes of Body follow its header.
type cpioEntry struct {
	Name         string
	Mode         uint32 // with the file type, as in stat(2)
	Size         int64
	Body         io.Reader
	Major, Minor uint32 // of a device node
}

func (c *cpioWriter) add(e cpioEntry) {
	if c.err != nil {
		return
	}
	if e.Size >= 1<<32 {
		c.err = fmt.Errorf("add %s to initramfs: larger than 4 GiB", e.Name)
		return
	}
	c.ino++
	c.printf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.ino, e.Mode, 0, 0, 1, 0, e.Size, 0, 0, e.Major, e.Minor, len(e.Name)+1, 0, e.Name)
	c.pad(110 + len(e.Name) + 1)
	if e.Body == nil || c.err != nil {
		return
	}
	n, err := io.Copy(c.w, io.LimitReader(e.Body, e.Size))
	if err == nil && n != e.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		c.err = fmt.Errorf("add %s to initramfs: %w", e.Name, err)
		return
	}
	c.pad(int(e.Size & 3))
}

// close writes the trailer.
func (c *cpioWriter) close() error {
	c.ino = ^uint32(0)
	c.add(cpioEntry{Name: "TRAILER!!!"})
	return c.err
}

func (c *cpioWriter) pad(n int) {
	if rest := n & 3; rest != 0 {
		c.printf("%s", "\x00\x00\x00"[:4-rest])
	}
}

func (c *cpioWriter) printf(format string, args ...any) {
	if c.err == nil {
		_, c.err = fmt.Fprintf(c.w, format, args...)
	}
}
