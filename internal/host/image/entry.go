package image

import (
	"archive/tar"
	"fmt"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// oldRegular is what old archives have for tar.TypeReg.
const oldRegular = '\x00'

// kind is what an entry of a layer is. The first five are also what an inode
// can be.
type kind uint8

const (
	kindFile kind = iota
	kindDir
	kindSymlink
	kindFifo
	kindHardlink
	kindWhiteout // removes path from the layers below
	kindOpaque   // hides everything that layers below have in path
)

func (k kind) String() string {
	switch k {
	case kindFile:
		return "file"
	case kindDir:
		return "directory"
	case kindSymlink:
		return "symbolic link"
	case kindFifo:
		return "fifo"
	case kindHardlink:
		return "hard link"
	case kindWhiteout, kindOpaque:
		return "whiteout"
	}
	return "entry"
}

// inode is one file of the image, whatever number of names it has.
type inode struct {
	kind     kind
	mode     uint16 // permission bits with setuid, setgid and sticky
	uid, gid uint32
	mtime    int64 // seconds
	size     int64 // of a file
	off      int64 // of a file's contents in spool
	spool    *spool
	link     string // target of a symbolic link
	xattrs   []xattr
	names    int32 // counted when the tree is written
}

// entry is one header of a layer, checked by itself.
type entry struct {
	path   string // "a/b", "" is the root
	ino    *inode // nil for hard links and whiteouts
	kind   kind
	target string // path of a hard link's target
}

// refuse is the refusal of one entry of a source.
func refuse(name, format string, args ...any) error {
	return fault.New(fault.Invalid, "entry %s: %s", quote(name), fmt.Sprintf(format, args...))
}

// quote makes a hostile string fit for an error message.
func quote(s string) string {
	const most = 200
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}

// cleanPath brings the name of an entry into its one form: no leading "/" or
// "./", no empty or "." parts, no trailing "/". A leading "/" names the root
// of the image, as tar itself takes it. Names with a ".." part are refused even
// when they stay inside: nothing honest writes them.
func cleanPath(name string, most int) (string, error) {
	if name == "" {
		return "", fmt.Errorf("the name is empty")
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("the name has a zero byte")
	}
	parts := strings.Split(name, "/")
	kept := parts[:0]
	for _, p := range parts {
		switch {
		case p == "" || p == ".":
		case p == "..":
			return "", fmt.Errorf("the name has a %q part, which may lead out of the image", "..")
		case len(p) > maxName:
			return "", fmt.Errorf("a part of the name is %d bytes long, the limit is %d", len(p), maxName)
		default:
			kept = append(kept, p)
		}
	}
	clean := strings.Join(kept, "/")
	if len(clean) > most {
		return "", fmt.Errorf("the name is %d bytes long, the limit is %d", len(clean), most)
	}
	return clean, nil
}

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // aufs's own files; nothing of the image
	whiteoutOpaque = ".wh..wh..opq"
)

// whiteout looks for the marks that a layer leaves for what it removed. skip
// tells that the entry is bookkeeping of the storage driver that made the
// layer and no part of the image.
func whiteout(path string) (k kind, target string, skip bool, err error) {
	dir, base := "", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, base = path[:i], path[i+1:]
	}
	for p := range strings.SplitSeq(dir, "/") {
		switch {
		case strings.HasPrefix(p, whiteoutMeta):
			return 0, "", true, nil
		case strings.HasPrefix(p, whiteoutPrefix):
			return 0, "", false, fmt.Errorf("it lies below a whiteout")
		}
	}
	switch {
	case base == whiteoutOpaque:
		return kindOpaque, dir, false, nil
	case strings.HasPrefix(base, whiteoutMeta):
		return 0, "", true, nil
	case !strings.HasPrefix(base, whiteoutPrefix):
		return kindFile, "", false, nil
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return 0, "", false, fmt.Errorf("it is a whiteout of nothing")
	}
	if dir != "" {
		name = dir + "/" + name
	}
	return kindWhiteout, name, false, nil
}

// newEntry checks one header by itself and turns it into an entry. A nil entry
// without an error is one to leave out.
func (lr *layerReader) newEntry(h *tar.Header) (*entry, error) {
	path, err := cleanPath(h.Name, lr.budget.lim.PathBytes)
	if err != nil {
		return nil, refuse(h.Name, "%v", err)
	}
	k, target, skip, err := whiteout(path)
	switch {
	case err != nil:
		return nil, refuse(h.Name, "%v", err)
	case skip:
		return nil, nil
	case k == kindWhiteout || k == kindOpaque:
		return &entry{path: target, kind: k}, nil
	}
	switch h.Typeflag {
	case tar.TypeReg, oldRegular, tar.TypeCont, tar.TypeGNUSparse:
		k = kindFile
	case tar.TypeDir:
		k = kindDir
	case tar.TypeSymlink:
		k = kindSymlink
	case tar.TypeFifo:
		k = kindFifo
	case tar.TypeLink:
		return lr.newHardlink(path, h)
	case tar.TypeChar, tar.TypeBlock:
		if lr.dropDevices && strings.HasPrefix(path, "dev/") {
			return nil, nil
		}
		return nil, refuse(h.Name, "it is a device node; an image brings none, the guest makes its own /dev")
	default:
		return nil, refuse(h.Name, "its type %q is none that an image can have", string(rune(h.Typeflag)))
	}
	ino, err := lr.newInode(k, h)
	if err != nil {
		return nil, err
	}
	if path == "" && k != kindDir {
		return nil, refuse(h.Name, "the root is a %v, not a directory", k)
	}
	return &entry{path: path, ino: ino, kind: k}, nil
}

func (lr *layerReader) newHardlink(path string, h *tar.Header) (*entry, error) {
	target, err := cleanPath(h.Linkname, lr.budget.lim.PathBytes)
	switch {
	case err != nil:
		return nil, refuse(h.Name, "it is a hard link to %s: %v", quote(h.Linkname), err)
	case target == "":
		return nil, refuse(h.Name, "it is a hard link to the root")
	case path == "":
		return nil, refuse(h.Name, "the root is a hard link, not a directory")
	}
	return &entry{path: path, kind: kindHardlink, target: target}, nil
}

func (lr *layerReader) newInode(k kind, h *tar.Header) (*inode, error) {
	ino := &inode{kind: k, mode: uint16(h.Mode & 0o7777), mtime: min(max(h.ModTime.Unix(), -1<<31), 1<<33)}
	if h.ModTime.IsZero() {
		ino.mtime = 0
	}
	if h.Uid < 0 || int64(h.Uid) > maxID || h.Gid < 0 || int64(h.Gid) > maxID {
		return nil, refuse(h.Name, "its owner %d:%d is out of range", h.Uid, h.Gid)
	}
	ino.uid, ino.gid = uint32(h.Uid), uint32(h.Gid)
	switch k {
	case kindSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxLinkname || strings.IndexByte(h.Linkname, 0) >= 0 {
			return nil, refuse(h.Name, "its target is empty, has a zero byte or is longer than %d bytes", maxLinkname)
		}
		ino.link, ino.mode = h.Linkname, 0o777
	case kindFile:
		if h.Size < 0 || h.Size > lr.budget.lim.FileBytes {
			return nil, refuse(h.Name, "it is %d bytes long, the limit for a file is %d", h.Size, lr.budget.lim.FileBytes)
		}
		ino.size = h.Size
	}
	var err error
	if ino.xattrs, err = readXattrs(h.PAXRecords, lr.budget.lim.XattrBytes); err != nil {
		return nil, refuse(h.Name, "%v", err)
	}
	return ino, nil
}
