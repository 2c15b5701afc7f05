package files

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// upload writes content in odd pieces.
func upload(t testing.TB, v View, path, content string, options CreateOptions) (Entry, error) {
	t.Helper()
	u, err := v.Create(path, options)
	if err != nil {
		return Entry{}, err
	}
	for rest := content; rest != ""; {
		n := min(len(rest), 1+rand.IntN(9000))
		if _, err := io.WriteString(u, rest[:n]); err != nil {
			u.Abort()
			return Entry{}, err
		}
		rest = rest[n:]
	}
	return u.Commit()
}

func download(t testing.TB, v View, path string) (string, error) {
	t.Helper()
	c, err := v.Open(path)
	if err != nil {
		return "", err
	}
	defer c.Close()
	data, err := io.ReadAll(c)
	return string(data), err
}

func TestUpload(t *testing.T) {
	p := newPlace(t)
	e, err := upload(t, p.app, "new/dir/file", "hello", CreateOptions{Metadata: map[string]string{"kind": "test"}})
	noErr(t, err)
	if e.Path != p.path("home/new/dir/file") || e.Owner != "app" || e.Mode != 0o644 || e.Size != 5 || e.Metadata["kind"] != "test" {
		t.Errorf("%+v", e)
	}
	if st := stat(t, p.path("home/new")); st.Uid != testUID || st.Gid != testUID {
		t.Errorf("the new parent belongs to %d:%d", st.Uid, st.Gid)
	}
	if got, err := download(t, p.app, "new/dir/file"); err != nil || got != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	// Over an existing one: mode kept, metadata replaced, nothing beside it.
	noErr(t, os.Chmod(e.Path, 0o4750))
	e, err = upload(t, p.app, "new/dir/file", "more", CreateOptions{Metadata: map[string]string{"other": "x"}})
	noErr(t, err)
	if d := cmp.Diff(map[string]string{"other": "x"}, e.Metadata); d != "" || e.Mode != 0o750 {
		t.Errorf("mode %o, %s", e.Mode, d)
	}
	left, err := os.ReadDir(p.path("home/new/dir"))
	if err != nil || len(left) != 1 {
		t.Errorf("%d entries, %v", len(left), err)
	}
	// With a mode of its own, but no more than permissions.
	if e, err = upload(t, p.app, "new/dir/file", "more", CreateOptions{Mode: 0o6711}); err != nil || e.Mode != 0o711 {
		t.Errorf("mode %o, %v", e.Mode, err)
	}
	// Through a link, to what it leads to.
	noErr(t, os.Symlink("file", p.path("home/new/dir/link")))
	_, err = upload(t, p.app, "new/dir/link", "via", CreateOptions{})
	noErr(t, err)
	if st := stat(t, p.path("home/new/dir/link")); st.Mode&unix.S_IFMT != unix.S_IFLNK || content(t, e.Path) != "via" {
		t.Error("the link was replaced")
	}
	_, err = upload(t, p.app, "empty", "", CreateOptions{})
	noErr(t, err)
}

func TestUploadIsSeenWholeOrNotAtAll(t *testing.T) {
	p := newPlace(t)
	path := p.put(t, "file", "old", 0o644)
	u, err := p.root.Create(path, CreateOptions{})
	noErr(t, err)
	_, err = io.WriteString(u, strings.Repeat("new", 10000))
	noErr(t, err)
	if content(t, path) != "old" {
		t.Error("half a file is seen")
	}
	u.Abort()
	u.Abort()
	left, err := filepath.Glob(p.path(tempPrefix + "*"))
	if err != nil || len(left) != 0 || content(t, path) != "old" {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestUploadRefusals(t *testing.T) {
	p := newPlace(t)
	noErr(t, os.Mkdir(p.path("dir"), 0o777))
	noErr(t, os.Chmod(p.path("dir"), 0o777))
	p.put(t, "dir/roots", "r", 0o644)
	noErr(t, unix.Mkfifo(p.path("dir/fifo"), 0o666))
	noErr(t, os.Symlink("loop", p.path("dir/loop")))
	noErr(t, os.Symlink(p.path("dir/roots"), p.path("dir/to-roots")))
	for path, class := range map[string]fault.Class{
		"dir/roots":              fault.Denied, // the directory would allow to replace it
		"dir/to-roots":           fault.Denied,
		"none/file":              fault.Denied,
		"dir":                    fault.Invalid,
		"dir/new/":               fault.Invalid,
		"dir/fifo":               fault.Invalid,
		"dir/loop":               fault.Invalid,
		"dir/roots/x":            fault.Invalid,
		strings.Repeat("x", 300): fault.Invalid,
	} {
		full := p.path() + "/" + path
		_, err := upload(t, p.app, full, "x", CreateOptions{})
		if class == fault.Invalid && fault.Is(err, fault.Denied) && !strings.HasPrefix(path, "dir") {
			continue // the kernel may look at rights first
		}
		wantClass(t, path, err, class)
	}
	_, err := upload(t, p.root, "/dev/null", "x", CreateOptions{})
	wantClass(t, "a device", err, fault.Invalid)
	for name, m := range map[string]map[string]string{
		"empty key": {"": "x"}, "long key": {strings.Repeat("k", 247): ""}, "unprintable": {"k": "a\nb"}, "too much": {"k": strings.Repeat("v", 4096)},
	} {
		_, err := upload(t, p.root, p.path("f"), "x", CreateOptions{Metadata: m})
		wantClass(t, name, err, fault.Invalid)
	}
	if _, err := os.Stat(p.path("f")); err == nil {
		t.Error("a refused upload left a file")
	}
}

// resolv.conf is often a mount of its own; a log may be writable in a
// directory that is not.
func TestUploadInPlace(t *testing.T) {
	p := newPlace(t)
	mine := p.put(t, "fixed/mine", strings.Repeat("old", 100), 0o644)
	noErr(t, os.Chown(mine, testUID, testUID))
	before := stat(t, mine)
	_, err := upload(t, p.app, mine, "new", CreateOptions{})
	noErr(t, err)
	if after := stat(t, mine); content(t, mine) != "new" || after.Ino != before.Ino {
		t.Errorf("%q", content(t, mine))
	}
	mounted := p.put(t, "m/file", "outer", 0o644)
	inner := p.put(t, "inner", "inner", 0o644)
	noErr(t, unix.Mount(inner, mounted, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(mounted, unix.MNT_DETACH) })
	_, err = upload(t, p.root, mounted, "through", CreateOptions{})
	noErr(t, err)
	if content(t, inner) != "through" {
		t.Errorf("%q", content(t, inner))
	}
}

func TestFullDisk(t *testing.T) {
	p := newPlace(t)
	mnt := p.path("small")
	noErr(t, os.Mkdir(mnt, 0o755))
	noErr(t, unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	_, err := upload(t, p.root, mnt+"/big", strings.Repeat("x", 2<<20), CreateOptions{})
	wantClass(t, "full", err, fault.Exhausted)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v is not seen as a full disk", err)
	}
	left, err := os.ReadDir(mnt)
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestReadingNeedsTheRight(t *testing.T) {
	p := newPlace(t)
	secret := p.put(t, "secret", "s", 0o600)
	team := p.put(t, "team", "t", 0o640)
	noErr(t, os.Chown(team, 0, 7001))
	noErr(t, os.Symlink(secret, p.path("home/link")))
	for _, path := range []string{secret, "link", "../secret"} {
		_, err := download(t, p.app, path)
		wantClass(t, path, err, fault.Denied)
	}
	if got, err := download(t, p.app, team); err != nil || got != "t" {
		t.Errorf("by a supplementary group: %q, %v", got, err)
	}
	_, err := download(t, p.root, p.path("home"))
	wantClass(t, "a directory", err, fault.Invalid)
	noErr(t, unix.Mkfifo(p.path("fifo"), 0o666))
	_, err = download(t, p.root, p.path("fifo"))
	wantClass(t, "a fifo", err, fault.Invalid)
	_, err = download(t, p.root, "/dev/zero")
	wantClass(t, "a device", err, fault.Invalid)
	if got, err := download(t, p.root, "/proc/self/stat"); err != nil || got == "" {
		t.Errorf("a made-up file: %q, %v", got, err)
	}
	if got, err := download(t, p.root, "/sys/kernel/mm/transparent_hugepage/enabled"); err == nil && (got == "" || len(got) > 1000) {
		t.Errorf("a made-up file with a made-up size: %d bytes", len(got))
	}
}

// pattern is random data with holes of many lengths at many places.
func pattern(size int) []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+rnd.IntN(50_000), size-off)
		if rnd.IntN(2) == 0 {
			for i := off; i < off+n; i++ {
				data[i] = byte(rnd.Uint32())
			}
		}
		off += n
	}
	return data
}

func TestHolesKeepTheContent(t *testing.T) {
	p := newPlace(t)
	for _, size := range []int{0, 1, blockBytes - 1, blockBytes, blockBytes + 1, 1_000_003, 3 << 20} {
		data := pattern(size)
		if size > 2<<20 {
			clear(data[size-1<<20:]) // ends in a hole
			clear(data[:1<<20])
		}
		e, err := upload(t, p.root, p.path("f"), string(data), CreateOptions{})
		noErr(t, err)
		got, err := download(t, p.root, p.path("f"))
		if err != nil || got != string(data) || e.Size != int64(size) {
			t.Errorf("size %d: other bytes (%d), %v", size, len(got), err)
		}
		c, err := p.root.Open(p.path("f"))
		noErr(t, err)
		for range 50 {
			if size == 0 {
				break
			}
			from := rand.IntN(size)
			n := min(rand.IntN(100_000), size-from)
			_, err := c.Seek(int64(from), io.SeekStart)
			noErr(t, err)
			part := make([]byte, n)
			if _, err := io.ReadFull(c, part); err != nil || !bytes.Equal(part, data[from:from+n]) {
				t.Fatalf("size %d from %d, %d bytes: wrong, %v", size, from, n, err)
			}
		}
		noErr(t, c.Close())
	}
}

func TestZerosCostNothing(t *testing.T) {
	p := newPlace(t)
	const size = 1 << 30
	u, err := p.root.Create(p.path("sparse"), CreateOptions{})
	noErr(t, err)
	_, err = u.ReadFrom(io.LimitReader(zeros{}, size))
	noErr(t, err)
	_, err = io.WriteString(u, "end")
	noErr(t, err)
	_, err = u.Commit()
	noErr(t, err)
	if st := stat(t, p.path("sparse")); st.Size != size+3 || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes take %d on disk", st.Size, st.Blocks*512)
	}
	c, err := p.root.Open(p.path("sparse"))
	noErr(t, err)
	defer c.Close()
	n, err := io.Copy(io.Discard, onlyReader{c})
	if n != size+3 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A GiB goes in and out with the same digest while the heap stays small.
func TestLargeFileFlatHeap(t *testing.T) {
	p := newPlace(t)
	const size = 1 << 30
	peak := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse
	}
	start := peak()
	block := pattern(4 << 20)
	in, out := sha256.New(), sha256.New()
	u, err := p.root.Create(p.path("big"), CreateOptions{})
	noErr(t, err)
	for i := range size / len(block) {
		block[i] ^= 0x55
		in.Write(block)
		_, err := u.Write(block)
		noErr(t, err)
	}
	_, err = u.Commit()
	noErr(t, err)
	c, err := p.root.Open(p.path("big"))
	noErr(t, err)
	defer c.Close()
	buf := make([]byte, 32<<10)
	highest := uint64(0)
	for i := 0; ; i++ {
		n, err := c.Read(buf)
		out.Write(buf[:n])
		if i%4096 == 0 {
			highest = max(highest, peak())
		}
		if errors.Is(err, io.EOF) {
			break
		}
		noErr(t, err)
	}
	if !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
		t.Error("other bytes came back")
	}
	if highest > start+64<<20 {
		t.Errorf("the heap grew from %d to %d bytes", start, highest)
	}
}

func TestFileThatShrinksWhileRead(t *testing.T) {
	p := newPlace(t)
	path := p.put(t, "f", strings.Repeat("x", 1<<20), 0o644)
	c, err := p.root.Open(path)
	noErr(t, err)
	defer c.Close()
	_, err = io.ReadFull(c, make([]byte, 1000))
	noErr(t, err)
	noErr(t, os.Truncate(path, 2000))
	if _, err := io.Copy(io.Discard, onlyReader{c}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v: the end looks like the real one", err)
	}
}
