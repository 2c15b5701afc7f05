package image

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// squashed reads layers and returns the paths of the image with their kinds.
func squashed(t testing.TB, layers ...[]byte) ([]string, error) {
	t.Helper()
	lim := Limits{}.withDefaults()
	lim.Entries, lim.UnpackedBytes = 100_000, 1<<20
	tr := newTree(lim.Entries)
	b := &budget{lim: lim}
	for _, l := range layers {
		sp, err := newSpool(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer sp.close() //nolint:errcheck // a test's spool
		lr := &layerReader{layer: rawLayer(l), budget: b, spool: sp}
		es, err := lr.read(testenv.Context(t))
		if err != nil {
			return nil, err
		}
		if err := tr.apply(es); err != nil {
			return nil, err
		}
	}
	if err := tr.check(); err != nil {
		return nil, err
	}
	var out []string
	n := int64(0)
	err := tr.root.walk("", func(path string, nd *node) error {
		n++
		out = append(out, map[kind]string{kindFile: "f", kindDir: "d", kindSymlink: "l", kindFifo: "p"}[nd.ino.kind]+" "+path)
		return nil
	})
	if n != tr.count {
		t.Errorf("the tree counts %d nodes and has %d", tr.count, n)
	}
	return out[1:], err
}

func TestSquash(t *testing.T) {
	type layers = [][]item
	for name, c := range map[string]struct {
		in   layers
		want string
	}{
		"replace file":                  {layers{{file("a", "1")}, {file("a", "2")}}, "f a"},
		"whiteout file":                 {layers{{file("a", ""), file("b", "")}, {file(".wh.a", "")}}, "f b"},
		"whiteout directory":            {layers{{file("d/x/y", ""), file("b", "")}, {file(".wh.d", "")}}, "f b"},
		"whiteout in directory":         {layers{{file("d/x", ""), file("d/y", "")}, {file("d/.wh.x", "")}}, "d d,f d/y"},
		"whiteout and again, before":    {layers{{file("a", "")}, {file(".wh.a", ""), file("a", "")}}, "f a"},
		"whiteout and again, after":     {layers{{file("a", "")}, {file("a", ""), file(".wh.a", "")}}, "f a"},
		"whiteout spares its own layer": {layers{{file("x", "")}, {file("d/a", ""), file("d/.wh.a", "")}}, "d d,f d/a,f x"},
		"whiteout two below":            {layers{{file("a", "")}, {file("b", "")}, {file(".wh.a", "")}}, "f b"},
		"whiteout, then back":           {layers{{file("d/a", "")}, {file(".wh.d", "")}, {file("d/b", "")}}, "d d,f d/b"},
		"whiteout by a lower layer":     {layers{{file(".wh.a", "")}, {file("a", "")}}, "f a"},
		"opaque":                        {layers{{file("d/a", ""), file("d/e/f", "")}, {dir("d"), file("d/.wh..wh..opq", ""), file("d/b", "")}}, "d d,f d/b"},
		"opaque after its files":        {layers{{file("d/a", "")}, {file("d/b", ""), file("d/.wh..wh..opq", "")}}, "d d,f d/b"},
		"opaque root":                   {layers{{file("a", ""), file("d/b", "")}, {file(".wh..wh..opq", ""), file("c", "")}}, "f c"},
		"opaque over a link":            {layers{{link(tar.TypeSymlink, "lib", "usr/lib"), file("usr/lib/x", "")}, {dir("lib"), file("lib/.wh..wh..opq", ""), file("lib/y", "")}}, "d lib,f lib/y,d usr,d usr/lib,f usr/lib/x"},
		"directory over file":           {layers{{file("a", "")}, {dir("a"), file("a/b", "")}}, "d a,f a/b"},
		"directory over link":           {layers{{link(tar.TypeSymlink, "a", "/etc")}, {dir("a"), file("a/b", "")}}, "d a,f a/b"},
		"file over directory":           {layers{{file("a/b/c", ""), file("x", "")}, {file("a", "")}}, "f a,f x"},
		"link over directory":           {layers{{file("a/b/c", "")}, {link(tar.TypeSymlink, "a", "b")}}, "l a"},
		"directory over directory":      {layers{{file("a/b", "")}, {dir("a").with(func(h *tar.Header) { h.Mode = 0o700 })}}, "d a,f a/b"},
		"hard link across layers":       {layers{{file("a", "x")}, {link(tar.TypeLink, "b", "a"), file("c", "")}}, "f a,f b,f c"},
		"hard link outlives its first":  {layers{{file("a", "x"), link(tar.TypeLink, "b", "a")}, {file(".wh.a", "")}}, "f b"},
		"hard link to a link":           {layers{{link(tar.TypeSymlink, "a", "x"), link(tar.TypeLink, "b", "a")}}, "l a,l b"},
	} {
		t.Run(name, func(t *testing.T) {
			var in [][]byte
			for _, l := range c.in {
				in = append(in, pack(t, l...))
			}
			got, err := squashed(t, in...)
			if err != nil {
				t.Fatal(err)
			}
			if g := strings.Join(got, ","); g != c.want {
				t.Errorf("got  %s\nwant %s", g, c.want)
			}
		})
	}
}

// TestClamp gives what a build made the time of what it was made from.
func TestClamp(t *testing.T) {
	at := stamp.Add(time.Hour)
	s := newStore(t, Limits{})
	build := func(after time.Duration) Digest {
		made := file("made", "x").with(func(h *tar.Header) { h.ModTime = at.Add(after) })
		return mustBuild(t, s, Source{Stream: bytes.NewReader(pack(t, file("given", "x"), made)), Clamp: at}).Digest
	}
	if a, b := build(0), build(time.Minute); a != b {
		t.Errorf("%s and %s differ by when they were built", a, b)
	}
}

// FuzzSquash feeds three layers of anything to the squasher. Whatever it
// accepts, the image must hold no path that leads anywhere else.
func FuzzSquash(f *testing.F) {
	f.Add(pack(f, file("a/b", "x"), link(tar.TypeLink, "c", "a/b")), pack(f, file("a/.wh.b", ""), dir("d")), pack(f, link(tar.TypeSymlink, "d", "/")))
	f.Add(pack(f, dir("./"), file("./a/.wh..wh..opq", "")), pack(f, file("../x", "")), []byte("x"))
	f.Add(squeeze(f, gzipped, pack(f, file("a", "b"))), squeeze(f, zstded, pack(f, file("a", "b"))), squeeze(f, xzed, pack(f, file("a", "b"))))
	f.Add(pack(f, file("l\xff\n", "").with(func(h *tar.Header) { h.PAXRecords["SCHILY.xattr.user.x"] = "y" })), []byte{}, []byte{0x1f, 0x8b})
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		got, err := squashed(t, a, b, c)
		if err != nil {
			if !fault.Is(err, fault.Invalid) {
				t.Fatalf("class %v: %v", fault.Of(err), err)
			}
			return
		}
		seen := map[string]string{"": "d"}
		for _, g := range got {
			kind, path := g[:1], g[2:]
			parent := ""
			if i := strings.LastIndexByte(path, '/'); i >= 0 {
				parent = path[:i]
			}
			if seen[parent] != "d" || seen[path] != "" {
				t.Fatalf("%q has no directory above it or is there twice", path)
			}
			for _, p := range strings.Split(path, "/") {
				if p == "" || p == "." || p == ".." || len(p) > maxName || strings.ContainsRune(p, 0) {
					t.Fatalf("%q has the part %q", path, p)
				}
			}
			seen[path] = kind
		}
	})
}

// TestSparseWriter writes pieces of all lengths through the sparse writer and
// compares with a plain one.
func TestSparseWriter(t *testing.T) {
	dir := t.TempDir()
	sp, err := newSpool(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer sp.close() //nolint:errcheck // a test's spool
	w := sp.sf
	var want []byte
	for i := range 200 {
		p := make([]byte, (i*1237)%20_000)
		if i%3 == 0 {
			for j := range p {
				p[j] = byte(i + 1)
			}
		}
		if n, err := w.Write(p); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
		want = append(want, p...)
	}
	// Going back must overwrite, with zeros too.
	for _, off := range []int{0, 5000, 70_001} {
		if _, err := w.Seek(int64(off), io.SeekStart); err != nil {
			t.Fatal(err)
		}
		z := make([]byte, 9000)
		if _, err := w.Write(z); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], z)
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(sp.f, 0, 1<<30))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d bytes, want %d, equal %v, %v", len(got), len(want), bytes.Equal(got, want), err)
	}
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(w); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back through it %d bytes, %v", len(got), err)
	}
	if len(names(t, dir)) != 0 {
		t.Error("the spool has a name")
	}
}

func TestACL(t *testing.T) {
	// user::rwx, user:1000:r--, group::r-x, mask::r-x, other::---
	const xattrForm = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
		"\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	const diskForm = "\x01\x00\x00\x00" + "\x01\x00\x07\x00" + "\x02\x00\x04\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00" + "\x10\x00\x05\x00" + "\x20\x00\x00\x00"
	got, err := aclToDisk(xattrForm)
	if diff := cmp.Diff(diskForm, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	for _, bad := range []string{"", "\x02\x00\x00", "\x01\x00\x00\x00", xattrForm + "x", "\x02\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"} {
		if _, err := aclToDisk(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestXZDictionary(t *testing.T) {
	if got := xzDict(squeeze(t, xzed, []byte("x"))); got != 8<<20 {
		t.Errorf("%d, want what the writer uses, 8 MiB", got)
	}
	b := squeeze(t, xzed, []byte("x"))
	i := bytes.Index(b, []byte{0x21, 0x01}) // the LZMA2 filter and its one byte
	b[i+2] = 40
	if got := xzDict(b); got < 4<<30-1 {
		t.Errorf("%d, want 4 GiB", got)
	}
	if _, err := squashed(t, b); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "dictionary") {
		t.Errorf("a dictionary of 4 GiB: %v", err)
	}
}

// rawLayer is a layer of which nothing is known but its bytes.
func rawLayer(b []byte) layer {
	return layer{name: "layer", size: -1, open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}
