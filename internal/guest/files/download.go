package files

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// Content is an open regular file. Close it. It is used by one goroutine.
type Content struct {
	file *os.File
	path string
	info os.FileInfo
	size int64 // -1: only reading tells

	pos int64
	// [dataFrom, dataTo) is known to hold data, what lies between pos and
	// dataFrom to be a hole.
	dataFrom, dataTo int64
}

// Open opens a regular file for reading.
func (v View) Open(path string) (*Content, error) {
	abs, err := v.resolve("path", path, false)
	if err != nil {
		return nil, err
	}
	var c *Content
	err = v.do(abs, func() error {
		// Opening a device can do things, and a fifo would hang; the second
		// look, at what was opened, is in newContent.
		info, err := os.Stat(abs)
		if err := notRegular(abs, info, err); err != nil {
			return err
		}
		fd, err := openPath(unix.AT_FDCWD, abs, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			return err
		}
		c, err = newContent(os.NewFile(uintptr(fd), abs), abs)
		return err
	})
	return c, err
}

func newContent(f *os.File, path string) (*Content, error) {
	info, err := f.Stat()
	if err := notRegular(path, info, err); err != nil {
		f.Close()
		return nil, err
	}
	c := &Content{file: f, path: path, info: info, size: info.Size()}
	if c.size == 0 || synthetic(f) {
		c.size = -1
	}
	return c, nil
}

// notRegular returns err, or what is wrong with reading the file of info.
func notRegular(path string, info os.FileInfo, err error) error {
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return unix.EISDIR
	case !info.Mode().IsRegular():
		return fault.BadField("path", "%s is not a regular file", quote(path))
	}
	return nil
}

// synthetic tells the filesystems that make their files up when read: the size
// of those says nothing.
func synthetic(f *os.File) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false
	}
	switch int64(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC,
		unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC:
		return true
	}
	return false
}

// Name returns the last part of the path, Size the bytes or -1 when only
// reading tells, Modified the time of the last change.
func (c *Content) Name() string        { return filepath.Base(c.path) }
func (c *Content) Size() int64         { return c.size }
func (c *Content) Modified() time.Time { return c.info.ModTime() }

// Close closes the file.
func (c *Content) Close() error { return c.file.Close() }

// Read reads on. Holes cost no disk access.
func (c *Content) Read(p []byte) (int, error) {
	if c.size < 0 {
		return c.file.Read(p)
	}
	if c.pos >= c.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), c.size-c.pos)]
	if c.pos >= c.dataTo {
		c.findData()
	}
	if c.pos < c.dataFrom {
		p = p[:min(int64(len(p)), c.dataFrom-c.pos)]
		clear(p)
		c.pos += int64(len(p))
		return len(p), nil
	}
	p = p[:min(int64(len(p)), c.dataTo-c.pos)]
	n, err := c.file.ReadAt(p, c.pos)
	c.pos += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	if n == 0 && errors.Is(err, io.EOF) {
		// It became shorter meanwhile; an end here would look like the whole.
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// findData looks for the next data from pos on. Where the filesystem can't
// tell, all is data.
func (c *Content) findData() {
	fd := int(c.file.Fd())
	from, err := unix.Seek(fd, c.pos, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // nothing but hole to the end
		c.dataFrom, c.dataTo = c.size, c.size
		return
	}
	if err != nil || from < c.pos {
		c.dataFrom, c.dataTo = c.pos, c.size
		return
	}
	to, err := unix.Seek(fd, from, unix.SEEK_HOLE)
	if err != nil || to <= from {
		to = c.size
	}
	c.dataFrom, c.dataTo = min(from, c.size), min(to, c.size)
}

// Seek moves to where the next Read starts. It needs a known size.
func (c *Content) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += c.pos
	case io.SeekEnd:
		offset += c.size
	}
	if offset < 0 || c.size < 0 {
		return 0, errors.New("seek: before the start, or in a file without a size")
	}
	c.pos, c.dataFrom, c.dataTo = offset, 0, 0
	return offset, nil
}
