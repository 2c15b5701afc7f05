package files

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxDelayed bounds the directories whose mode and time are set at the end.
const maxDelayed = 1 << 20

// UnpackOptions say how a tar stream is laid out.
type UnpackOptions struct {
	// Preserve keeps the owners (by number), setuid and setgid bits and
	// capabilities of the stream, which takes root. Else everything belongs to
	// the user.
	Preserve bool
}

// Unpacked counts what an archive brought.
type Unpacked struct {
	Entries int64
	Bytes   int64
}

// Unpack lays a tar stream out below the directory at path, which is made if it
// is missing. No entry gets outside of it: a name with ".." is refused, a
// leading "/" is dropped, and an entry that would go through a link out of the
// directory is an error. Files replace files at once and whole; links in the
// way of files are replaced, never followed; a directory that exists stays,
// also behind a link within. After an error, what was laid out before remains.
func (v View) Unpack(path string, r io.Reader, options UnpackOptions) (Unpacked, error) {
	abs, err := v.resolve("path", path, true)
	if err != nil {
		return Unpacked{}, err
	}
	if options.Preserve && v.user.UID != 0 {
		return Unpacked{}, fault.New(fault.Denied, "only root can keep the owners of an archive, not user %s", v.user.Label())
	}
	u := &unpacker{view: v, path: abs, options: options, tr: tar.NewReader(r)}
	err = v.do(abs, func() error {
		if err := os.MkdirAll(abs, 0o755); err != nil {
			return err
		}
		root, err := openRoot(abs)
		if err != nil {
			return err
		}
		defer root.Close()
		u.root = root
		return u.run()
	})
	return u.done, err
}

type unpacker struct {
	view    View
	path    string
	options UnpackOptions
	tr      *tar.Reader
	root    *os.Root
	done    Unpacked
	delayed []delayed
}

// delayed is a directory that gets its mode and time when nothing is put into
// it any more.
type delayed struct {
	name string
	mode fs.FileMode
	when time.Time
}

func (u *unpacker) run() error {
	for {
		h, err := u.tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return u.streamError(err)
		}
		name, err := entryName(h.Name)
		if err != nil {
			return err
		}
		if name == "." {
			continue // the directory itself is the caller's, not the archive's
		}
		if err := u.entry(name, h); err != nil {
			return u.entryError(h, err)
		}
		u.done.Entries++
	}
	for i := len(u.delayed) - 1; i >= 0; i-- {
		d := u.delayed[i]
		_ = u.root.Chmod(d.name, d.mode)
		_ = u.root.Chtimes(d.name, d.when, d.when)
	}
	return nil
}

func (u *unpacker) streamError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fault.New(fault.Invalid, "the archive is damaged or cut off after %d entries: %w", u.done.Entries, err)
	}
	return fmt.Errorf("read archive: %w", err)
}

func (u *unpacker) entryError(h *tar.Header, err error) error {
	// os.Root has no exported error for it.
	if strings.Contains(err.Error(), "path escapes from parent") {
		return fault.New(fault.Invalid, "archive entry %s leads out of %s through a link", quote(h.Name), quote(u.path))
	}
	return u.view.explain(u.path+"/"+h.Name, err)
}

// entryName makes the name of an entry relative and clean.
func entryName(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fault.New(fault.Invalid, "archive entry %s: names with '..' are refused", quote(name))
		}
	}
	if strings.ContainsRune(name, 0) {
		return "", fault.New(fault.Invalid, "archive entry %s: a name with a NUL byte", quote(name))
	}
	if rel := strings.TrimLeft(path.Clean("/"+name), "/"); rel != "" {
		return rel, nil
	}
	return ".", nil
}

func (u *unpacker) entry(name string, h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		if dir := path.Dir(name); dir != "." {
			if err := u.root.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(name, h)
	case tar.TypeDir:
		return u.directory(name, h)
	case tar.TypeSymlink:
		return u.replace(name, func(temp string) error {
			if err := u.root.Symlink(h.Linkname, temp); err != nil {
				return err
			}
			return u.own(temp, h)
		})
	case tar.TypeLink:
		target, err := entryName(h.Linkname)
		if err != nil {
			return err
		}
		return u.replace(name, func(temp string) error { return u.root.Link(target, temp) })
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		return u.node(name, h)
	}
	return fault.New(fault.Invalid, "archive entry of type %q is not known", h.Typeflag)
}

// replace makes something under a temporary name beside name and renames it
// there, so that nothing half-made is seen and no link is followed.
func (u *unpacker) replace(name string, build func(temp string) error) error {
	temp := path.Join(path.Dir(name), tempName())
	if err := build(temp); err != nil {
		_ = u.root.Remove(temp)
		return err
	}
	if err := u.root.Rename(temp, name); err != nil {
		_ = u.root.Remove(temp)
		return err
	}
	// Renaming a hard link onto itself leaves both names.
	if err := u.root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (u *unpacker) file(name string, h *tar.Header) error {
	return u.replace(name, func(temp string) error {
		f, err := u.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		w := &Upload{view: u.view, asked: u.path + "/" + name, file: f}
		n, err := w.ReadFrom(u.tr)
		u.done.Bytes += n
		if err == nil && len(w.pending) > 0 {
			err = w.put(w.pending)
		}
		if err == nil {
			err = f.Truncate(w.size)
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return u.streamError(err)
		}
		if err != nil {
			return err
		}
		if err := u.own(temp, h); err != nil {
			return err
		}
		if err := u.attributes(f, h); err != nil {
			return err
		}
		if err := unix.Fchmod(int(f.Fd()), uint32(h.Mode)&u.modeMask()); err != nil {
			return err
		}
		if err := u.root.Chtimes(temp, h.ModTime, h.ModTime); err != nil {
			return err
		}
		return f.Close()
	})
}

func (u *unpacker) modeMask() uint32 {
	if u.options.Preserve {
		return 0o7777
	}
	return 0o777
}

// own gives the new thing its owner. It follows no link.
func (u *unpacker) own(name string, h *tar.Header) error {
	if !u.options.Preserve {
		return nil
	}
	return u.root.Lchown(name, h.Uid, h.Gid)
}

// attributes sets the extended attributes that the filesystem takes.
func (u *unpacker) attributes(f *os.File, h *tar.Header) error {
	for record, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(record, xattrRecord)
		if !ok || !portable(attr) || (attr == "security.capability" && !u.options.Preserve) {
			continue
		}
		err := unix.Fsetxattr(int(f.Fd()), attr, []byte(value), 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set attribute %s: %w", attr, err)
		}
	}
	return nil
}

func (u *unpacker) directory(name string, h *tar.Header) error {
	if info, err := u.root.Lstat(name); err == nil && !info.IsDir() {
		// A link to a directory within stays, as /lib does in many systems.
		if to, err := u.root.Stat(name); err == nil && to.IsDir() {
			return nil
		} else if info.Mode().Type() != fs.ModeSymlink {
			return unix.ENOTDIR
		}
		if err := u.root.Remove(name); err != nil {
			return err
		}
	}
	if err := u.root.MkdirAll(name, 0o755); err != nil {
		return err
	}
	if err := u.own(name, h); err != nil {
		return err
	}
	f, err := u.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := u.attributes(f, h); err != nil {
		return err
	}
	if len(u.delayed) < maxDelayed {
		mode := fs.FileMode(h.Mode) & 0o777
		if u.options.Preserve {
			mode = h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
		}
		u.delayed = append(u.delayed, delayed{name, mode, h.ModTime})
	}
	return nil
}

// node makes a fifo or a device, the latter with root's rights only.
func (u *unpacker) node(name string, h *tar.Header) error {
	mode := uint32(h.Mode) & u.modeMask()
	dev := uint64(0)
	switch h.Typeflag {
	case tar.TypeFifo:
		mode |= unix.S_IFIFO
	case tar.TypeChar:
		mode |= unix.S_IFCHR
		dev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	case tar.TypeBlock:
		mode |= unix.S_IFBLK
		dev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	}
	return u.replace(name, func(temp string) error {
		dir, err := u.root.OpenFile(path.Dir(temp), os.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer dir.Close()
		if err := unix.Mknodat(int(dir.Fd()), path.Base(temp), mode, int(dev)); err != nil {
			return err
		}
		return u.own(temp, h)
	})
}
