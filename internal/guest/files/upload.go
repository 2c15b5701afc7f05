package files

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// blockBytes is the grain of holes: runs of zeros of this size, at multiples of
// it, are not written.
const blockBytes = 4 << 10

// CreateOptions say how an uploaded file is made.
type CreateOptions struct {
	// Metadata becomes user.e2b.* attributes and replaces what was there.
	Metadata map[string]string
	// Mode is the permission bits, 0777. 0: those of the file that is there,
	// else 0644. A file that is written in place keeps its own.
	Mode uint32
}

// Upload is a file that is being written. Nobody sees it before Commit. It is
// used by one goroutine; end it with Commit or Abort.
type Upload struct {
	view    View
	path    string // where it goes, links followed
	asked   string // where it was asked to go
	file    *os.File
	dir     *os.File
	temp    string // empty: written in place
	mode    uint32
	options CreateOptions
	size    int64
	pending []byte // the start of a block
}

// Create begins the upload of a file, making missing parent directories. A
// link at path is followed; an existing file keeps its mode unless one is given,
// and is replaced as a whole, owned by the user. Where the directory takes no new files but the
// file itself may be written, it is written in place, not atomically.
func (v View) Create(path string, options CreateOptions) (*Upload, error) {
	abs, err := v.resolve("path", path, false)
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(path, "/") || abs == "/" {
		return nil, fault.BadField("path", "%s names a directory: name a file", quote(path))
	}
	if err := checkMetadata(options.Metadata); err != nil {
		return nil, err
	}
	u := &Upload{view: v, asked: abs, options: options, mode: 0o644}
	if err := v.do(abs, func() error { return u.open(abs) }); err != nil {
		u.closeFiles()
		return nil, err
	}
	if options.Mode != 0 {
		u.mode = options.Mode & 0o777
	}
	return u, nil
}

// open runs with the user's rights.
func (u *Upload) open(abs string) error {
	if err := makeParents(abs); err != nil {
		return err
	}
	target, err := followLast(abs)
	if err != nil {
		return err
	}
	u.path = target
	dir, err := openPath(unix.AT_FDCWD, filepath.Dir(target), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	u.dir = os.NewFile(uintptr(dir), filepath.Dir(target))
	base := filepath.Base(target)
	var st unix.Stat_t
	switch err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case errors.Is(err, unix.ENOENT):
		return u.openTemp(dir)
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return unix.EISDIR
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fault.BadField("path", "%s is not a regular file", quote(target))
	}
	// As with any write, setuid and setgid don't survive.
	u.mode = st.Mode & 0o777
	return u.openOver(dir, base)
}

// openOver prepares to replace an existing file.
func (u *Upload) openOver(dir int, base string) error {
	// That takes the right to write it, not only to replace it. A program that
	// runs can't be opened for writing, but may be replaced.
	old, err := openPath(dir, base, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, unix.ETXTBSY) {
		return u.openTemp(dir)
	}
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(old), u.path)
	if !mountPoint(old) {
		err := u.openTemp(dir)
		if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EROFS) {
			return errors.Join(err, file.Close())
		}
	}
	u.file = file
	return file.Truncate(0)
}

// mountPoint reports whether the file itself is mounted, as container
// runtimes do with resolv.conf: renaming over it fails.
func mountPoint(fd int) bool {
	var stx unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, 0, &stx)
	return err == nil && stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

func (u *Upload) openTemp(dir int) error {
	name := tempName()
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	u.file, u.temp = os.NewFile(uintptr(fd), name), name
	return nil
}

// tempPrefix marks files that are being uploaded.
const tempPrefix = ".hutch-upload-"

func tempName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return tempPrefix + hex.EncodeToString(b[:])
}

// followLast follows the link at the end of path, and the one that leads to,
// and so on.
func followLast(path string) (string, error) {
	for range 40 {
		target, err := os.Readlink(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) {
			return path, nil
		}
		if err != nil {
			return "", err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Dir(path) + "/" + target
		}
		path = target
	}
	return "", unix.ELOOP
}

// Write adds to the file. Blocks of zeros become holes.
func (u *Upload) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if len(u.pending) > 0 || len(p) < blockBytes {
			n := min(blockBytes-len(u.pending), len(p))
			u.pending = append(u.pending, p[:n]...)
			p = p[n:]
			if len(u.pending) == blockBytes {
				if err := u.put(u.pending); err != nil {
					return 0, err
				}
				u.pending = u.pending[:0]
			}
			continue
		}
		whole := len(p) / blockBytes * blockBytes
		if err := u.put(p[:whole]); err != nil {
			return 0, err
		}
		p = p[whole:]
	}
	return total, nil
}

// put writes whole blocks, in as few writes as the holes allow.
func (u *Upload) put(p []byte) error {
	start := 0
	flush := func(end int) error {
		if start < end {
			if _, err := u.file.WriteAt(p[start:end], u.size+int64(start)); err != nil {
				return u.view.explain(u.asked, err)
			}
		}
		return nil
	}
	for off := 0; off < len(p); off += blockBytes {
		end := min(off+blockBytes, len(p))
		if end-off == blockBytes && isZero(p[off:end]) {
			if err := flush(off); err != nil {
				return err
			}
			start = end
		}
	}
	if err := flush(len(p)); err != nil {
		return err
	}
	u.size += int64(len(p))
	return nil
}

// ReadFrom writes all of r, in large steps. Only io.EOF is the end: a body that
// was cut off has another error, and may have it just once.
func (u *Upload) ReadFrom(r io.Reader) (int64, error) {
	buf := make([]byte, 128<<10)
	var total int64
	have := 0
	for {
		n, err := r.Read(buf[have:])
		have += n
		if have == len(buf) || err != nil {
			if _, werr := u.Write(buf[:have]); werr != nil {
				return total, werr
			}
			total += int64(have)
			have = 0
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// Size returns the bytes taken so far.
func (u *Upload) Size() int64 { return u.size + int64(len(u.pending)) }

// Commit makes the file appear under its name. On error nothing changed,
// unless it was written in place.
func (u *Upload) Commit() (Entry, error) {
	if len(u.pending) > 0 {
		if err := u.put(u.pending); err != nil {
			u.Abort()
			return Entry{}, err
		}
		u.pending = nil
	}
	if err := u.view.do(u.asked, u.finish); err != nil {
		u.Abort()
		return Entry{}, err
	}
	u.temp = ""
	u.closeFiles()
	return u.view.entry(u.asked)
}

func (u *Upload) finish() error {
	// The size may end in a hole.
	if err := u.file.Truncate(u.size); err != nil {
		return err
	}
	fd := int(u.file.Fd())
	if err := setMetadata(fd, u.options.Metadata); err != nil {
		return err
	}
	if u.temp == "" {
		return u.file.Close()
	}
	if err := unix.Fchmod(fd, u.mode); err != nil {
		return err
	}
	// Some filesystems report a full disk only now.
	if err := u.file.Close(); err != nil {
		return err
	}
	dir := int(u.dir.Fd())
	return unix.Renameat(dir, u.temp, dir, filepath.Base(u.path))
}

// Abort removes what was written. After Commit it does nothing.
func (u *Upload) Abort() {
	u.dropTemp()
	u.closeFiles()
}

func (u *Upload) dropTemp() {
	if u.temp == "" || u.dir == nil {
		return
	}
	name := u.temp
	u.temp = ""
	err := u.view.user.Do(func() error { return unix.Unlinkat(int(u.dir.Fd()), name, 0) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		u.view.store.log.Warn("temporary file of an upload not removed", "dir", u.dir.Name(), "name", name, "err", err)
	}
}

func (u *Upload) closeFiles() {
	for _, f := range []*os.File{u.file, u.dir} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// isZero compares p with itself one byte further, which is one call of the
// fastest comparison there is.
func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

func checkMetadata(m map[string]string) error {
	total := 0
	for k, v := range m {
		if k == "" || len(k) > maxMetadataKey || !printable(k) || !printable(v) {
			return fault.BadField("metadata", "bad entry %q: key and value must be printable ASCII, the key 1 to %d bytes", k, maxMetadataKey)
		}
		total += len(metadataPrefix) + len(k) + len(v)
	}
	if total > maxMetadataTotal {
		return fault.BadField("metadata", "%d bytes with prefixes: the most is %d", total, maxMetadataTotal)
	}
	return nil
}

// setMetadata replaces what an earlier upload left.
func setMetadata(fd int, m map[string]string) error {
	for _, name := range attributeNames(func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) }) {
		if _, keep := m[strings.TrimPrefix(name, metadataPrefix)]; strings.HasPrefix(name, metadataPrefix) && !keep {
			if err := unix.Fremovexattr(fd, name); err != nil && !errors.Is(err, unix.ENODATA) {
				return err
			}
		}
	}
	for k, v := range m {
		err := unix.Fsetxattr(fd, metadataPrefix+k, []byte(v), 0)
		if errors.Is(err, unix.ENOTSUP) {
			return fault.New(fault.Precondition, "the filesystem keeps no extended attributes, so no metadata: upload without it")
		}
		if err != nil {
			return fmt.Errorf("set metadata %q: %w", k, err)
		}
	}
	return nil
}
