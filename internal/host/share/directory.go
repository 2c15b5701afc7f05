package share

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// directory is an open directory of the host.
type directory struct {
	*os.File        // opened as a place only, with O_PATH
	path     string // where it really is
	uid, gid int
}

// open opens a directory that may be shared.
func (v *Virtiofs) open(s sandbox.Share) (*directory, error) {
	d, err := openDirectory(s.HostPath)
	if err != nil {
		return nil, fault.New(fault.Precondition, "share %s: %w", s.HostPath, err)
	}
	if err := v.allowed(d, s); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// openDirectory follows links on the way. Where they led is what path tells.
func openDirectory(path string) (*directory, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open it on hutchd's host: %w", err)
	}
	d := &directory{File: os.NewFile(uintptr(fd), path)}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && st.Nlink == 0 {
		err = unix.ENOENT // its name is one of the past
	}
	if err == nil {
		d.path, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look where it is: %w", err), d.Close())
	}
	d.uid, d.gid = int(st.Uid), int(st.Gid)
	return d, nil
}

// allowed checks where a directory is, and whose it is.
func (v *Virtiofs) allowed(d *directory, s sandbox.Share) error {
	for _, own := range v.p.Deny {
		own = real(own)
		if within(d.path, own) || within(own, d.path) {
			return fault.New(fault.Precondition, "share %s: %s belongs to the host itself and is never shared", s.HostPath, own)
		}
	}
	ok := false
	for _, a := range v.p.Allow {
		ok = ok || within(d.path, real(a))
	}
	switch {
	case len(v.p.Allow) == 0:
		return fault.New(fault.Precondition, "share %s: this host shares no directory; its administrator can allow some in hutchd.toml: [shares] allow = [%q]", s.HostPath, d.path)
	case !ok:
		return fault.New(fault.Precondition, "share %s: %s is not below a directory that this host shares (%s); [shares] allow in hutchd.toml lists them", s.HostPath, d.path, strings.Join(v.p.Allow, ", "))
	case ofGuests(d.uid) || ofGuests(d.gid):
		return fault.New(fault.Precondition, "share %s: it belongs to %d:%d, which are ids of programs in guests; make it a user's of the host (chown)", s.HostPath, d.uid, d.gid)
	case d.uid == 0 && !s.ReadOnly:
		return fault.New(fault.Precondition, "share %s: it belongs to root, as whom a guest must not write; make it another user's (chown) or share it read-only", s.HostPath)
	}
	return nil
}

// ofGuests tells whether an id is that of a user in guests only.
func ofGuests(id int) bool { return id >= ownerBase && id < ownerBase+jail.MappedIDs }

// real is where a path leads, or the path where that can't be told.
func real(path string) string {
	if r, err := filepath.EvalSymlinks(path); err == nil {
		return r
	}
	return filepath.Clean(path)
}

// within tells whether path is dir or below it. Both are clean.
func within(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}
