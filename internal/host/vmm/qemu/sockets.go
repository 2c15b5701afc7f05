package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The sockets in Spec.Dir.
const (
	controlSocket = "qmp.sock"
	consoleSocket = "console.sock"
	linkSocket    = "link.sock"
)

func sockets() []string { return []string{controlSocket, consoleSocket, linkSocket} }

func socketPath(dir, name string) string { return filepath.Join(dir, name) }

// listen makes a listening socket, in place of one that an earlier machine
// left, and returns its descriptor.
func listen(ctx context.Context, path string) (*os.File, error) {
	if c, err := dial(ctx, path); err == nil {
		c.Close()
		return nil, fmt.Errorf("make socket %s: a running machine has it", path)
	}
	if err := removeSocket(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("make socket: %w", err), removeSocket(path))
	}
	f, err := l.File()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make socket: %w", err), removeSocket(path))
	}
	return f, nil
}

// removeSocket removes a socket, and nothing that is none.
func removeSocket(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove socket: %w", err)
	}
	if st.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("remove socket %s: it is none", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove socket: %w", err)
	}
	return nil
}

func removeSockets(dir string) error {
	var errs []error
	for _, s := range sockets() {
		errs = append(errs, removeSocket(socketPath(dir, s)))
	}
	return errors.Join(errs...)
}

// dial connects to a listening socket. That never waits, so it does not end
// with ctx, whose deadline a dialer would tell as an error of its own.
func dial(ctx context.Context, path string) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(context.WithoutCancel(ctx), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU: %w", err)
	}
	return conn, nil
}

// fileSet are the open files of a child, numbered as they are added.
type fileSet struct {
	files []*os.File
	first int
}

// add takes f over and returns its number in the child.
func (s *fileSet) add(f *os.File) int {
	s.files = append(s.files, f)
	return s.first + len(s.files) - 1
}

func (s *fileSet) close() {
	for _, f := range s.files {
		f.Close()
	}
}

// openFor opens a file that QEMU opens again by its descriptor, which its own
// user must be allowed to.
func openFor(uid int, what, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", what, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("open %s: %w", what, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("open %s %s: not a regular file", what, path)
	case st.Size == 0:
		err = fmt.Errorf("open %s %s: it is empty", what, path)
	case st.Mode&0o004 == 0 && (int(st.Uid) != uid || st.Mode&0o400 == 0):
		err = fmt.Errorf("open %s %s: QEMU runs as user %d and may not read a file of mode %#o: make it readable for all (chmod o+r)", what, path, uid, st.Mode&0o777)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// openDisk opens a disk as it is passed to QEMU.
func openDisk(path string, readOnly bool) (*os.File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open disk: %w", err)
	}
	block := st.Mode()&fs.ModeDevice != 0 && st.Mode()&fs.ModeCharDevice == 0
	switch {
	case !st.Mode().IsRegular() && !block:
		err = fmt.Errorf("open disk %s: neither a file nor a block device", path)
	case st.Mode().IsRegular() && (st.Size() == 0 || st.Size()%512 != 0):
		err = fmt.Errorf("open disk %s: its %d bytes are not a number of 512-byte sectors", path, st.Size())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
