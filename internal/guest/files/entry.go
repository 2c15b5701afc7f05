package files

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/account"
)

// Type is the kind of a file.
type Type uint8

// The types. A link has the type of what it leads to, and Symlink when that is
// neither a file nor a directory or does not exist: clients of E2B know only
// those two and drop the rest from listings.
const (
	Other Type = iota
	File
	Directory
	Symlink
)

// Entry describes one file.
type Entry struct {
	Name string
	Type Type
	Path string
	Size int64
	// Mode is the permission bits with setuid, setgid and sticky: 07777.
	Mode uint32
	// Permissions is the mode as "ls" writes it, "-rw-r--r--".
	Permissions string
	Owner       string
	Group       string
	Modified    time.Time
	// Target is where a link leads to: the whole way when it can be walked,
	// else what the link says. Empty for anything else.
	Target string
	// Metadata are the user.e2b.* attributes without that prefix.
	Metadata map[string]string
}

// metadataPrefix names the extended attributes that hold E2B's metadata.
const metadataPrefix = "user.e2b."

// Limits of metadata, from the contract of E2B's uploads.
const (
	maxMetadataKey   = 246
	maxMetadataTotal = 4096
)

// entryAt describes path itself. It runs with the user's rights.
func entryAt(path string, names *account.Names) (Entry, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return Entry{}, err
	}
	return describe(path, info, names), nil
}

func describe(path string, info fs.FileInfo, names *account.Names) Entry {
	e := Entry{
		Name: filepath.Base(path), Path: path, Size: info.Size(),
		Permissions: permissions(info.Mode()), Mode: unixMode(info.Mode()), Modified: info.ModTime(),
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = names.User(st.Uid), names.Group(st.Gid)
	}
	e.Type = typeOf(info.Mode())
	switch e.Type {
	case Symlink:
		e.Target, e.Type = follow(path)
	case File, Directory:
		e.Metadata = metadata(path)
	case Other:
	}
	return e
}

func typeOf(mode fs.FileMode) Type {
	switch mode.Type() {
	case 0:
		return File
	case fs.ModeDir:
		return Directory
	case fs.ModeSymlink:
		return Symlink
	}
	return Other
}

func follow(path string) (string, Type) {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		if info, err := os.Lstat(target); err == nil {
			if t := typeOf(info.Mode()); t == File || t == Directory {
				return target, t
			}
		}
		return target, Symlink
	}
	raw, _ := os.Readlink(path)
	return raw, Symlink
}

// permissions writes the mode as ls does; package fs has its own letters for
// all but the nine bits.
func permissions(mode fs.FileMode) string {
	kind := byte('-')
	switch mode.Type() {
	case fs.ModeDir:
		kind = 'd'
	case fs.ModeSymlink:
		kind = 'l'
	case fs.ModeNamedPipe:
		kind = 'p'
	case fs.ModeSocket:
		kind = 's'
	case fs.ModeDevice:
		kind = 'b'
	case fs.ModeDevice | fs.ModeCharDevice:
		kind = 'c'
	}
	s := []byte(mode.Perm().String())
	s[0] = kind
	for _, bit := range []struct {
		mode fs.FileMode
		at   int
		yes  byte
		no   byte
	}{{fs.ModeSetuid, 3, 's', 'S'}, {fs.ModeSetgid, 6, 's', 'S'}, {fs.ModeSticky, 9, 't', 'T'}} {
		if mode&bit.mode == 0 {
			continue
		}
		if s[bit.at] == 'x' {
			s[bit.at] = bit.yes
		} else {
			s[bit.at] = bit.no
		}
	}
	return string(s)
}

func unixMode(mode fs.FileMode) uint32 {
	m := uint32(mode.Perm())
	if mode&fs.ModeSetuid != 0 {
		m |= unix.S_ISUID
	}
	if mode&fs.ModeSetgid != 0 {
		m |= unix.S_ISGID
	}
	if mode&fs.ModeSticky != 0 {
		m |= unix.S_ISVTX
	}
	return m
}

// metadata reads what an upload left. Values that the guest made too large or
// unprintable are left out.
func metadata(path string) map[string]string {
	names := attributeNames(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) })
	var m map[string]string
	total := 0
	for _, name := range names {
		key, ok := strings.CutPrefix(name, metadataPrefix)
		if !ok || key == "" || !printable(key) {
			continue
		}
		var buf [maxMetadataTotal]byte
		n, err := unix.Lgetxattr(path, name, buf[:])
		if err != nil || !printable(string(buf[:n])) {
			continue
		}
		if total += len(name) + n; total > maxMetadataTotal {
			break
		}
		if m == nil {
			m = map[string]string{}
		}
		m[key] = string(buf[:n])
	}
	return m
}

// attributeNames lists extended attributes; none where there can't be any.
func attributeNames(list func([]byte) (int, error)) []string {
	var small [512]byte
	buf := small[:]
	n, err := list(buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10) // XATTR_LIST_MAX
		n, err = list(buf)
	}
	if err != nil || n <= 0 {
		return nil
	}
	var names []string
	for name := range bytes.SplitSeq(bytes.TrimRight(buf[:n], "\x00"), []byte{0}) {
		names = append(names, string(name))
	}
	return names
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}
