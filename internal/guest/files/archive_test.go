package files

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

func pack(t testing.TB, v View, path string) []byte {
	t.Helper()
	tree, err := v.OpenTree(path)
	noErr(t, err)
	defer tree.Close()
	var buf bytes.Buffer
	noErr(t, tree.Pack(&buf))
	return buf.Bytes()
}

// inventory describes a tree line by line.
func inventory(t testing.TB, root string) []string {
	t.Helper()
	var lines []string
	noErr(t, filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		st := stat(t, path)
		line := fmt.Sprintf("%s %o %d:%d nlink=%d", rel, st.Mode, st.Uid, st.Gid, st.Nlink)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			attr := make([]byte, 100)
			n, _ := unix.Lgetxattr(path, "user.note", attr)
			line += fmt.Sprintf(" %q %q %d", content(t, path), attr[:max(n, 0)], st.Mtim.Sec)
		case unix.S_IFLNK:
			to, _ := os.Readlink(path)
			line += " -> " + to
		case unix.S_IFDIR:
			line += fmt.Sprint(" ", st.Mtim.Sec)
		case unix.S_IFCHR:
			line += fmt.Sprint(" ", st.Rdev)
		}
		lines = append(lines, line)
		return nil
	}))
	return lines
}

func richTree(t testing.TB, p *place) string {
	t.Helper()
	when := time.Unix(1_600_000_000, 0)
	p.put(t, "src/plain", "plain", 0o644)
	p.put(t, "src/d/exec", "#!", 0o4755)
	noErr(t, os.Chown(p.path("src/d/exec"), testUID, 7001))
	noErr(t, os.Chmod(p.path("src/d/exec"), 0o755|os.ModeSetuid))
	noErr(t, unix.Setxattr(p.path("src/plain"), "user.note", []byte("kept\x00bytes"), 0))
	noErr(t, os.Link(p.path("src/plain"), p.path("src/d/same")))
	noErr(t, os.Symlink("../plain", p.path("src/d/link")))
	noErr(t, os.Symlink("/etc/passwd", p.path("src/out")))
	noErr(t, unix.Mkfifo(p.path("src/fifo"), 0o640))
	noErr(t, unix.Mknod(p.path("src/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	p.put(t, "src/"+strings.Repeat("long", 50)+"/ünï", "x", 0o600)
	for _, f := range []string{"src/plain", "src/d/exec", "src/d"} {
		noErr(t, os.Chtimes(p.path(f), when, when))
	}
	noErr(t, os.Chmod(p.path("src/d"), 0o555))
	return p.path("src")
}

func TestArchiveRoundTrip(t *testing.T) {
	p := newPlace(t)
	src := richTree(t, p)
	data := pack(t, p.root, src)
	done, err := p.root.Unpack(p.path("dst"), bytes.NewReader(data), UnpackOptions{Preserve: true})
	noErr(t, err)
	if d := cmp.Diff(inventory(t, src), inventory(t, p.path("dst"))); d != "" {
		t.Error(d)
	}
	if done.Entries != 10 || done.Bytes != 5+2+1 {
		t.Errorf("%+v", done)
	}
	// Again, over itself.
	_, err = p.root.Unpack(p.path("dst"), bytes.NewReader(data), UnpackOptions{Preserve: true})
	noErr(t, err)
	if d := cmp.Diff(inventory(t, src), inventory(t, p.path("dst"))); d != "" {
		t.Errorf("the second time: %s", d)
	}
}

func TestUnpackBelongsToTheUser(t *testing.T) {
	p := newPlace(t)
	src := richTree(t, p)
	noErr(t, os.Remove(filepath.Join(src, "null")))
	data := pack(t, p.root, src)
	_, err := p.app.Unpack("copy", bytes.NewReader(data), UnpackOptions{})
	noErr(t, err)
	for _, name := range []string{"", "plain", "d", "d/exec", "d/link"} {
		if st := stat(t, p.path("home/copy", name)); st.Uid != testUID || st.Gid != testUID || st.Mode&unix.S_ISUID != 0 {
			t.Errorf("%q: %d:%d %o", name, st.Uid, st.Gid, st.Mode)
		}
	}
	_, err = p.app.Unpack("copy", bytes.NewReader(data), UnpackOptions{Preserve: true})
	wantClass(t, "owners without root", err, fault.Denied)
	_, err = p.app.Unpack(p.path("elsewhere"), bytes.NewReader(data), UnpackOptions{})
	wantClass(t, "where app may not write", err, fault.Denied)
}

func TestPackOneFileAndOfAnother(t *testing.T) {
	p := newPlace(t)
	p.put(t, "d/file", "x", 0o600)
	noErr(t, os.Symlink("d/file", p.path("link")))
	for _, path := range []string{"d/file", "link"} {
		h, err := tar.NewReader(bytes.NewReader(pack(t, p.root, p.path(path)))).Next()
		if err != nil || h.Name != "file" || h.Typeflag != tar.TypeReg {
			t.Errorf("%s: %+v, %v", path, h, err)
		}
	}
	tree, err := p.app.OpenTree(p.path("d"))
	noErr(t, err)
	defer tree.Close()
	wantClass(t, "an unreadable file", tree.Pack(io.Discard), fault.Denied)
	_, err = p.root.OpenTree(p.path("none"))
	wantClass(t, "nothing", err, fault.NotFound)
}

type item struct {
	h    tar.Header
	body string
}

func file(name, body string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, body}
}

func link(kind byte, name, target string) item {
	return item{tar.Header{Name: name, Typeflag: kind, Linkname: target, Mode: 0o777}, ""}
}

func dir(name string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}

func archive(t testing.TB, items ...item) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, it := range items {
		it.h.Size = int64(len(it.body))
		noErr(t, w.WriteHeader(&it.h))
		_, err := io.WriteString(w, it.body)
		noErr(t, err)
	}
	noErr(t, w.Close())
	return buf.Bytes()
}

// Nothing of these gets out of the destination, whatever else happens.
func TestHostileArchives(t *testing.T) {
	p := newPlace(t)
	p.put(t, "outside/secret", "precious", 0o600)
	p.put(t, "pre/keep", "", 0o644)
	noErr(t, os.Symlink(p.path("outside"), p.path("pre/link")))
	noErr(t, os.Symlink("../outside/secret", p.path("pre/filelink")))
	out := p.path("outside")
	for name, tc := range map[string]struct {
		items []item
		class fault.Class // Internal: no error
	}{
		"dot dot":                {[]item{file("../evil", "x")}, fault.Invalid},
		"dot dot inside":         {[]item{file("a/../../evil", "x")}, fault.Invalid},
		"dot dot directory":      {[]item{dir("a/..")}, fault.Invalid},
		"absolute":               {[]item{file(out+"/evil", "x")}, fault.Internal},
		"through absolute link":  {[]item{link(tar.TypeSymlink, "l", out), file("l/evil", "x")}, fault.Invalid},
		"through relative link":  {[]item{link(tar.TypeSymlink, "l", "../outside"), file("l/evil", "x")}, fault.Invalid},
		"through two links":      {[]item{link(tar.TypeSymlink, "a", "."), link(tar.TypeSymlink, "a/b", ".."), file("b/outside/evil", "x")}, fault.Invalid},
		"directory through link": {[]item{link(tar.TypeSymlink, "l", out), dir("l/evil")}, fault.Invalid},
		"link through link":      {[]item{link(tar.TypeSymlink, "l", out), link(tar.TypeSymlink, "l/evil", "x")}, fault.Invalid},
		"fifo through link":      {[]item{link(tar.TypeSymlink, "l", out), {tar.Header{Name: "l/evil", Typeflag: tar.TypeFifo, Mode: 0o600}, ""}}, fault.Invalid},
		"over a link":            {[]item{link(tar.TypeSymlink, "l", out+"/secret"), file("l", "x")}, fault.Internal},
		"hard link out":          {[]item{link(tar.TypeLink, "h", "../outside/secret")}, fault.Invalid},
		"hard link through link": {[]item{link(tar.TypeSymlink, "l", out), link(tar.TypeLink, "h", "l/secret"), file("h", "x")}, fault.Invalid},
		"hard link to a link":    {[]item{link(tar.TypeSymlink, "l", out+"/secret"), link(tar.TypeLink, "h", "l"), file("h", "x")}, fault.Internal},
		"links that stand there": {[]item{file("link/evil", "x")}, fault.Invalid},
		"file link there":        {[]item{file("filelink", "x")}, fault.Internal},
		"directory over link":    {[]item{dir("filelink"), file("filelink/evil", "x")}, fault.Internal},
		"mode of a link":         {[]item{link(tar.TypeSymlink, "l", out), {tar.Header{Name: "l", Typeflag: tar.TypeDir, Mode: 0o777}, ""}}, fault.Internal},
		"file over directory":    {[]item{dir("d"), file("d", "x")}, fault.Exists},
		"unknown type":           {[]item{{tar.Header{Name: "x", Typeflag: 'Z'}, ""}}, fault.Invalid},
		"only itself":            {[]item{dir("./"), dir("/")}, fault.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			dst := p.path("dst")
			noErr(t, os.RemoveAll(dst))
			noErr(t, os.Mkdir(dst, 0o755))
			for _, l := range []string{"link", "filelink"} {
				to, err := os.Readlink(p.path("pre", l))
				noErr(t, err)
				noErr(t, os.Symlink(to, filepath.Join(dst, l)))
			}
			before := append(inventory(t, out), fmt.Sprintf("%o", stat(t, out).Mode))
			_, err := p.root.Unpack(dst, bytes.NewReader(archive(t, tc.items...)), UnpackOptions{})
			after := append(inventory(t, out), fmt.Sprintf("%o", stat(t, out).Mode))
			if d := cmp.Diff(before, after); d != "" {
				t.Fatalf("it got out: %s", d)
			}
			if tc.class == fault.Internal {
				noErr(t, err)
			} else {
				wantClass(t, "unpack", err, tc.class)
			}
			if _, err := os.Lstat(p.path("evil")); err == nil {
				t.Error("it got out")
			}
			for _, l := range inventory(t, dst) {
				if strings.Contains(l, tempPrefix) {
					t.Errorf("left: %s", l)
				}
			}
		})
	}
}

func TestDamagedArchives(t *testing.T) {
	p := newPlace(t)
	whole := archive(t, file("a", strings.Repeat("x", 5000)), file("b", "y"))
	for _, n := range []int{100, 512, 3000, 7000} {
		_, err := p.root.Unpack(p.path("dst"), bytes.NewReader(whole[:n]), UnpackOptions{})
		wantClass(t, fmt.Sprint("cut at ", n), err, fault.Invalid)
	}
	_, err := p.root.Unpack(p.path("dst"), strings.NewReader(strings.Repeat("junk", 1000)), UnpackOptions{})
	wantClass(t, "junk", err, fault.Invalid)
	left, err := os.ReadDir(p.path("dst"))
	if names := fmt.Sprint(left); err != nil || names != "[- a - b]" { // those that were whole
		t.Errorf("left: %v, %v", names, err)
	}
}

// While the archive is laid out, a directory of the destination is exchanged
// again and again with a link to the outside.
func TestUnpackWhileLinksAreSwapped(t *testing.T) {
	p := newPlace(t)
	p.put(t, "outside/secret", "precious", 0o600)
	var items []item
	for i := range 300 {
		items = append(items, file(fmt.Sprintf("d/f%d", i), "x"), dir(fmt.Sprintf("d/s%d", i)), link(tar.TypeSymlink, fmt.Sprintf("d/l%d", i), "x"))
	}
	data := archive(t, items...)
	for range 20 {
		noErr(t, os.MkdirAll(p.path("dst/d"), 0o755))
		noErr(t, os.Symlink(p.path("outside"), p.path("dst/link")))
		before := inventory(t, p.path("outside"))
		stop := swap(t, p.path("dst/d"), p.path("dst/link"))
		_, err := p.root.Unpack(p.path("dst"), bytes.NewReader(data), UnpackOptions{})
		stop()
		if err == nil {
			t.Log("the swapping never met the unpacking")
		}
		if d := cmp.Diff(before, inventory(t, p.path("outside"))); d != "" {
			t.Fatalf("it got out: %s", d)
		}
		noErr(t, os.RemoveAll(p.path("dst")))
	}
}

func TestPackWhileLinksAreSwapped(t *testing.T) {
	p := newPlace(t)
	p.put(t, "outside/f", "precious", 0o600)
	p.put(t, "src/d/f", "harmless", 0o600)
	noErr(t, os.Symlink(p.path("outside"), p.path("src/link")))
	stop := swap(t, p.path("src/d"), p.path("src/link"))
	defer stop()
	for range 300 {
		tree, err := p.root.OpenTree(p.path("src"))
		noErr(t, err)
		var buf bytes.Buffer
		_ = tree.Pack(&buf)
		noErr(t, tree.Close())
		if bytes.Contains(buf.Bytes(), []byte("precious")) {
			t.Fatal("packed through a link")
		}
	}
}

func TestPackLeavesOutMadeUpFilesystems(t *testing.T) {
	p := newPlace(t)
	p.put(t, "src/file", "x", 0o644)
	noErr(t, os.Mkdir(p.path("src/proc"), 0o755))
	noErr(t, unix.Mount("proc", p.path("src/proc"), "proc", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(p.path("src/proc"), unix.MNT_DETACH) })
	r := tar.NewReader(bytes.NewReader(pack(t, p.root, p.path("src"))))
	var names []string
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		noErr(t, err)
		names = append(names, h.Name)
	}
	if d := cmp.Diff([]string{"./", "./file", "./proc/"}, names); d != "" {
		t.Error(d)
	}
}

// Whatever an archive calls its entries, the name stays below the destination.
func FuzzEntryName(f *testing.F) {
	for _, seed := range []string{"a/b", "../a", "/etc/passwd", "./", "a//b/./c", "..", "a/..", "...", "a\x00b", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got, err := entryName(name)
		if err == nil && !filepath.IsLocal(got) {
			t.Errorf("%q becomes %q", name, got)
		}
	})
}
