package dockersock

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
)

// maxPath is the longest path of a Unix socket, in bytes.
const maxPath = 107

// socket is a listener that removes its file, unless another took its place.
type socket struct {
	*net.UnixListener
	path string
	made fs.FileInfo
}

// openSocket listens at path, in the place of whatever socket is there: it is
// of a hutchd before. Nobody but root can connect at any time.
func openSocket(path string) (*socket, error) {
	fresh := path + "~"
	if len(fresh) > maxPath {
		return nil, fmt.Errorf("listen on %s: a socket's path has at most %d bytes; use a shorter run directory", path, maxPath-1)
	}
	// A sandbox without a VM may have lost its directory to a reboot.
	dir := filepath.Dir(path)
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return nil, fmt.Errorf("make directory of sockets: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(fresh, 0o600)
	made, statErr := os.Lstat(fresh)
	if err = errors.Join(err, statErr); err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close(), os.Remove(fresh))
	}
	return &socket{l, path, made}, nil
}

// stands reports whether the file is still this socket's.
func (s *socket) stands() bool {
	st, err := os.Lstat(s.path)
	return err == nil && os.SameFile(st, s.made)
}

// remove closes the listener and removes its file.
func (s *socket) remove() {
	_ = s.Close()
	if s.stands() {
		_ = os.Remove(s.path)
	}
}
