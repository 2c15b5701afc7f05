package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_raw=ep

// sample is a root filesystem with one of everything.
func sample() []item {
	long := strings.Repeat("n", 200)
	return []item{
		dir("./"),
		dir("./bin/"),
		file("./bin/app", "#!/bin/sh\n").with(func(h *tar.Header) { h.Mode = 0o4755 }),
		link(tar.TypeLink, "./bin/app2", "./bin/app"),
		link(tar.TypeSymlink, "./abs", "/etc/passwd"),
		link(tar.TypeSymlink, "./longlink", strings.Repeat("x/", 100)),
		dir("./etc/").with(func(h *tar.Header) { h.Mode, h.Uid, h.Gid = 0o2750, 70000, 100001 }),
		file("./etc/passwd", "root:x:0:0::/:/bin/sh\n").with(func(h *tar.Header) {
			h.PAXRecords["SCHILY.xattr.security.capability"] = capability
			h.PAXRecords["SCHILY.xattr.user.note"] = strings.Repeat("v", 300)
			h.PAXRecords["SCHILY.xattr.user.a"] = ""
			h.PAXRecords["SCHILY.xattr.trusted.overlay.opaque"] = "y"
			h.PAXRecords["SCHILY.xattr.com.apple.provenance"] = "zzz"
		}),
		special(tar.TypeFifo, "./pipe"),
		file("./empty", ""),
		file("./"+long+"/"+long, "deep\n"),
		file("./größe\xff", "not UTF-8\n"),
		file("./holes", "start"+strings.Repeat("\x00", 1<<20)+"end"),
	}
}

// TestSameFilesSameDigest builds the same files from every kind of source.
func TestSameFilesSameDigest(t *testing.T) {
	testenv.CheckGoroutines(t)
	s := newStore(t, Limits{})
	root := pack(t, sample()...)
	tmp := t.TempDir()
	write := func(name string, b []byte) string {
		writeFile(t, filepath.Join(tmp, name), b)
		return filepath.Join(tmp, name)
	}
	want := mustBuild(t, s, Source{Path: write("root.tar", root)})
	if want.Entries != 14 {
		t.Errorf("the image has %d entries, want 14", want.Entries)
	}
	fsck(t, mustPath(t, s, want.Digest))

	gz := writeLayout(t, layoutSpec{layers: []stored{asLayer(t, gzipped, root)}})
	split := sample()
	three := writeLayout(t, layoutSpec{layers: []stored{
		asLayer(t, zstded, pack(t, append([]item{file("bin/gone", "x"), dir("etc"), file("etc/shadow", "s"), dir("opt"), file("opt/x/y", "z")}, split[:4]...)...)),
		asLayer(t, gzipped, pack(t, append([]item{file("bin/.wh.gone", ""), file("etc/.wh..wh..opq", ""), file(".wh.opt", "")}, split[4:9]...)...)),
		asLayer(t, plain, pack(t, split[9:]...)),
	}})
	img, saved := savedArchive(t, gz)
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/team/app:1.0"
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		src    Source
		config bool
	}{
		"tar.gz":       {src: Source{Path: write("root.tgz", squeeze(t, gzipped, root))}},
		"tar.zst":      {src: Source{Path: write("root.zst", squeeze(t, zstded, root))}},
		"tar.xz":       {src: Source{Path: write("root.xz", squeeze(t, xzed, root))}},
		"stream":       {src: Source{Stream: io.MultiReader(bytes.NewReader(root[:700]), bytes.NewReader(root[700:]))}},
		"layout gzip":  {Source{Path: gz}, true},
		"layout zstd":  {Source{Path: writeLayout(t, layoutSpec{layers: []stored{asLayer(t, zstded, root)}})}, true},
		"three layers": {Source{Path: three}, true},
		"layout tar":   {Source{Path: write("layout.tar", packDir(t, gz))}, true},
		"layout stream, packed": {
			Source{Stream: bytes.NewReader(squeeze(t, zstded, packDir(t, three))), Label: "upload"}, true,
		},
		"docker save":        {Source{Path: write("save.tar", saved)}, true},
		"docker save stream": {Source{Stream: bytes.NewReader(squeeze(t, gzipped, saved))}, true},
		"old docker save":    {Source{Path: write("old.tar", oldSave(t, root))}, true},
		"registry":           {Source{Ref: ref}, true},
	} {
		t.Run(name, func(t *testing.T) {
			got := mustBuild(t, s, c.src)
			if got.Digest != want.Digest || got.Size != want.Size {
				t.Errorf("digest %s of %d bytes, want %s of %d", got.Digest, got.Size, want.Digest, want.Size)
			}
			if c.config {
				if diff := cmp.Diff(wantConfig, got.Config); diff != "" {
					t.Errorf("config (-want +got):\n%s", diff)
				}
				if got.Platform != "linux/amd64" {
					t.Errorf("platform %q", got.Platform)
				}
			}
			if got.Source != c.src.String() {
				t.Errorf("source %q", got.Source)
			}
		})
	}
	if all, broken, err := s.List(); len(all) != 1 || len(broken) != 0 || err != nil {
		t.Errorf("the store has %d images and %v, %v; want the one", len(all), broken, err)
	}
}

// savedArchive turns a layout into what docker save writes.
func savedArchive(t *testing.T, layoutDir string) (v1.Image, []byte) {
	t.Helper()
	p, err := layout.FromPath(layoutDir)
	if err != nil {
		t.Fatal(err)
	}
	idx, err := p.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	im, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := idx.Image(im.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("app:1.0")
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := tarball.Write(tag, img, &buf); err != nil {
		t.Fatal(err)
	}
	return img, buf.Bytes()
}

// oldSave is an archive as docker before 25 wrote it, with a layer that is a
// link to another's.
func oldSave(t *testing.T, root []byte) []byte {
	t.Helper()
	cf := toJSON(t, v1.ConfigFile{OS: "linux", Architecture: "amd64", Config: testConfig(), RootFS: v1.RootFS{
		Type: "layers", DiffIDs: []v1.Hash{blobSum(root), blobSum(root)},
	}})
	id1, id2, id3 := strings.Repeat("1", 64), strings.Repeat("2", 64), strings.Repeat("c", 64)
	return pack(t,
		dir(id1+"/"), file(id1+"/VERSION", "1.0"), file(id1+"/layer.tar", string(root)),
		dir(id2+"/"), link(tar.TypeSymlink, id2+"/layer.tar", "../"+id1+"/layer.tar"),
		file(id3+".json", string(cf)),
		file("manifest.json", string(toJSON(t, []savedImage{{Config: id3 + ".json", RepoTags: []string{"app:1.0"}, Layers: []string{id1 + "/layer.tar", id2 + "/layer.tar"}}}))),
	)
}

// TestContents reads an image back with the tools of ext4.
func TestContents(t *testing.T) {
	s := newStore(t, Limits{})
	img := mustBuild(t, s, Source{Stream: bytes.NewReader(pack(t, sample()...))})
	p := mustPath(t, s, img.Digest)
	for path, want := range map[string][]string{
		"/bin/app":  {"Type: regular", "Mode:  04755", "Links: 2", "Size: 10", "mtime: 0x6553f100"},
		"/etc":      {"Type: directory", "Mode:  02750", "User: 70000", "Group: 100001"},
		"/abs":      {"Type: symlink", `Fast link dest: "/etc/passwd"`},
		"/pipe":     {"Type: FIFO"},
		"/longlink": {"Type: symlink", "Size: 200"},
	} {
		got := debugfs(t, p, "stat %s", path)
		for _, w := range want {
			if !strings.Contains(strings.Join(strings.Fields(got), " "), strings.Join(strings.Fields(w), " ")) {
				t.Errorf("%s lacks %q:\n%s", path, w, got)
			}
		}
	}
	if got := debugfs(t, p, "cat /etc/passwd"); got != "root:x:0:0::/:/bin/sh\n" {
		t.Errorf("/etc/passwd is %q", got)
	}
	if got := debugfs(t, p, "cat /holes"); got != "start"+strings.Repeat("\x00", 1<<20)+"end" {
		t.Errorf("/holes came back wrong, %d bytes", len(got))
	}
	if img.Stored > img.Size-1<<19 {
		t.Errorf("%d of %d bytes are stored: the hole is not one", img.Stored, img.Size)
	}
	if fi, err := os.Stat(p); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("mode %v, %v; want 0444", fi.Mode(), err)
	}
}

func TestBuildLeavesNothingWhenCancelled(t *testing.T) {
	testenv.CheckGoroutines(t)
	s := newStore(t, Limits{})
	root := pack(t, sample()...)
	// Cancel at every step that reports progress, once each.
	for i := 0; ; i++ {
		ctx, cancel := context.WithCancelCause(testenv.Context(t))
		gone := errors.New("the caller left")
		n := 0
		img, err := s.Build(ctx, Source{Stream: bytes.NewReader(root)}, func(string, int64, int64) {
			if n == i {
				cancel(gone)
			}
			n++
		})
		cancel(nil)
		if n <= i {
			if err != nil {
				t.Fatalf("not cancelled, and yet: %v", err)
			}
			img.Release()
			break
		}
		if err == nil {
			img.Release() // the last report comes when all is done
			continue
		}
		if !errors.Is(err, gone) && !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled at report %d: %v", i, err)
		}
		if left := names(t, s.p.Work); len(left) > 0 {
			t.Fatalf("cancelled at report %d, left %q", i, left)
		}
		if _, err := s.Collect(testenv.Context(t), func(Digest) bool { return false }); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMemory builds an image from 300 MB in one file and looks at the heap.
func TestMemory(t *testing.T) {
	const size, limit = 300 << 20, 64 << 20
	pr, pw := io.Pipe()
	go func() {
		tw := tar.NewWriter(pw)
		h := file("big", "").h
		h.Size = size
		err := tw.WriteHeader(&h)
		block := make([]byte, 64<<10)
		for i := 0; i < size/len(block) && err == nil; i++ {
			block[i%len(block)]++ // never all zero
			_, err = tw.Write(block)
		}
		pw.CloseWithError(errors.Join(err, tw.Close()))
	}()
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	peak, reports := uint64(0), 0
	s := newStore(t, Limits{})
	img, err := s.Build(testenv.Context(t), Source{Stream: pr, Kind: RootTar}, func(string, int64, int64) {
		if reports++; reports%64 == 0 {
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapAlloc)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	img.Release()
	if peak == 0 || peak-min(peak, before.HeapAlloc) > limit {
		t.Errorf("the heap grew by %d MiB from %d MiB for a file of %d MiB", (peak-before.HeapAlloc)>>20, before.HeapAlloc>>20, size>>20)
	}
}

func TestSourceMustBeOne(t *testing.T) {
	s := newStore(t, Limits{})
	for _, src := range []Source{
		{},
		{Ref: "a", Path: "b"},
		{Stream: strings.NewReader(""), Ref: "a"},
		{Path: "b", Kind: "zip"},
		{Path: "b", Platform: "amd64"},
		{Path: "b", Platform: "windows/amd64"},
		{Ref: "UPPER CASE"},
	} {
		if _, err := s.Build(testenv.Context(t), src, nil); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v, want it refused", src, err)
		}
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, "/dev/zero"} {
		if _, err := s.Build(testenv.Context(t), Source{Path: path}, nil); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "regular file") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := s.Build(testenv.Context(t), Source{Path: "/nowhere"}, nil); !fault.Is(err, fault.NotFound) {
		t.Errorf("a path that is not there: %v", err)
	}
}
