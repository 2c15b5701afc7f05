package files

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// xattrRecord is the PAX record that tar programs keep extended attributes in.
const xattrRecord = "SCHILY.xattr."

// maxXattr is the kernel's limit for one value.
const maxXattr = 64 << 10

// maxLinks bounds the memory for finding hard links again: further ones are
// packed as files of their own.
const maxLinks = 1 << 20

// Tree is a file or directory that is about to be packed.
type Tree struct {
	view View
	path string
	root *os.Root // of the directory, or of the one that holds the file
	name string   // "." for a directory
	dir  bool
}

// OpenTree looks up what Pack will read. A link at path is followed. Close it.
func (v View) OpenTree(path string) (*Tree, error) {
	abs, err := v.resolve("path", path, true)
	if err != nil {
		return nil, err
	}
	t := &Tree{view: v, path: abs, name: "."}
	err = v.do(abs, func() error {
		info, err := os.Stat(abs)
		if err != nil {
			return err
		}
		t.dir = info.IsDir()
		open := abs
		if !t.dir {
			if open, err = followLast(abs); err != nil {
				return err
			}
			t.name = filepath.Base(open)
			open = filepath.Dir(open)
		}
		t.root, err = openRoot(open)
		return err
	})
	return t, err
}

// Dir reports whether it is a directory.
func (t *Tree) Dir() bool { return t.dir }

// Close lets go of the tree.
func (t *Tree) Close() error { return t.root.Close() }

// Pack writes a tar stream (PAX) of the tree: a directory's content below
// "./", or a single file under its name. It holds types, modes, owners as
// numbers and names, times, links, devices and user.* and capability
// attributes; sockets are left out. Files that vanish while it walks are left
// out; one that shrinks while it is read is an error, because the stream
// can't be right any more. Other filesystems below the tree are entered, but
// for those that the kernel makes up (/proc, /sys).
func (t *Tree) Pack(w io.Writer) error {
	p := packer{
		tree: t, tw: tar.NewWriter(w), names: t.view.store.params.Accounts.Names(),
		links: map[fileID]string{}, buf: make([]byte, 128<<10),
	}
	err := t.view.do(t.path, func() error { return p.add(t.name, 0, 0) })
	if err != nil {
		return err
	}
	if err := p.tw.Close(); err != nil {
		return fmt.Errorf("finish archive: %w", err)
	}
	return nil
}

type fileID struct{ dev, ino uint64 }

type packer struct {
	tree  *Tree
	tw    *tar.Writer
	names interface {
		User(uint32) string
		Group(uint32) string
	}
	links map[fileID]string
	buf   []byte
}

// add packs name and, when it is a directory, what is in it.
func (p *packer) add(name string, depth int, parent uint64) error {
	if depth > maxDepth {
		return fault.New(fault.Invalid, "path %s is nested more than %d deep", quote(p.tree.path), maxDepth)
	}
	info, err := p.tree.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) && depth > 0 {
		return nil
	}
	if err != nil {
		return err
	}
	h, err := p.header(name, info)
	if h == nil || err != nil {
		return err
	}
	if h.Typeflag == tar.TypeReg {
		return p.addFile(name, h)
	}
	if err := p.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	dev := uint64(info.Sys().(*syscall.Stat_t).Dev)
	if !info.IsDir() || (depth > 0 && dev != parent && p.madeUp(name)) {
		return nil
	}
	children, err := readNames(p.tree.root, name, 1<<31-2)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return p.tree.view.explain(filepath.Join(p.tree.path, name), err)
	}
	for _, child := range children {
		if err := p.add(filepath.Join(name, child), depth+1, dev); err != nil {
			return err
		}
	}
	return nil
}

// madeUp reports whether a directory is on a filesystem without content of its
// own.
func (p *packer) madeUp(name string) bool {
	f, err := p.tree.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	return synthetic(f)
}

// header describes one entry; nil for what is left out.
func (p *packer) header(name string, info fs.FileInfo) (*tar.Header, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, fmt.Errorf("look at %s: no system data", name)
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: "./" + name, Mode: int64(unixMode(info.Mode())), ModTime: info.ModTime(),
		Uid: int(st.Uid), Gid: int(st.Gid), Uname: p.names.User(st.Uid), Gname: p.names.Group(st.Gid),
	}
	if name == "." || !p.tree.dir {
		h.Name = name
	}
	id := fileID{uint64(st.Dev), st.Ino}
	if first, seen := p.links[id]; seen && !info.IsDir() {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return h, nil
	}
	if st.Nlink > 1 && !info.IsDir() && len(p.links) < maxLinks {
		p.links[id] = h.Name
	}
	switch info.Mode().Type() {
	case 0:
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		h.PAXRecords = p.attributes(name)
	case fs.ModeSymlink:
		target, err := p.tree.root.Readlink(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		h.Typeflag = tar.TypeBlock
		if info.Mode()&fs.ModeCharDevice != 0 {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	default:
		return nil, nil
	}
	return h, nil
}

// attributes reads a directory's.
func (p *packer) attributes(name string) map[string]string {
	f, err := p.tree.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	return attributeRecords(f)
}

func attributeRecords(f *os.File) map[string]string {
	fd := int(f.Fd())
	var records map[string]string
	for _, attr := range attributeNames(func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) }) {
		if !portable(attr) {
			continue
		}
		buf := make([]byte, maxXattr)
		n, err := unix.Fgetxattr(fd, attr, buf)
		if err != nil {
			continue
		}
		if records == nil {
			records = map[string]string{}
		}
		records[xattrRecord+attr] = string(buf[:n])
	}
	return records
}

// portable tells the attributes that mean the same in another place.
func portable(attr string) bool {
	return strings.HasPrefix(attr, "user.") && !strings.ContainsRune(attr, '=') || attr == "security.capability"
}

func (p *packer) addFile(name string, h *tar.Header) error {
	shown := filepath.Join(p.tree.path, name)
	f, err := p.tree.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) && p.tree.dir {
		return nil
	}
	if err != nil {
		return p.tree.view.explain(shown, err)
	}
	c, err := newContent(f, shown)
	if err != nil {
		return err
	}
	defer c.Close()
	h.PAXRecords = attributeRecords(f)
	// What a file of a made-up filesystem holds is only known afterwards; it
	// is packed as far as its size says, which for most is nothing.
	h.Size = max(c.size, 0)
	if err := p.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	if h.Size == 0 {
		return nil
	}
	if _, err := io.CopyBuffer(p.tw, onlyReader{c}, p.buf); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return fault.New(fault.Unavailable, "path %s became shorter while it was read: try again", quote(shown))
		}
		return fmt.Errorf("pack %s: %w", quote(shown), err)
	}
	return nil
}

// onlyReader keeps io.CopyBuffer to the given buffer.
type onlyReader struct{ io.Reader }
