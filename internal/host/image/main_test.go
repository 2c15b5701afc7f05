package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/hutch-run/hutch/internal/testenv"
)

// item is one entry of a tar that a test makes.
type item struct {
	h    tar.Header
	body string
}

var stamp = time.Unix(1_700_000_000, 0)

func file(name, body string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body)), ModTime: stamp}, body}
}

func dir(name string) item {
	return item{h: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: stamp}}
}

func link(typ byte, name, target string) item {
	return item{h: tar.Header{Name: name, Typeflag: typ, Linkname: target, Mode: 0o777, ModTime: stamp}}
}

func special(typ byte, name string) item {
	return item{h: tar.Header{Name: name, Typeflag: typ, Mode: 0o600, Devmajor: 1, Devminor: 3, ModTime: stamp}}
}

// with changes the header of an item.
func (i item) with(f func(*tar.Header)) item {
	if i.h.PAXRecords == nil {
		i.h.PAXRecords = map[string]string{}
	}
	f(&i.h)
	return i
}

// pack writes a tar.
func pack(t testing.TB, items ...item) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, i := range items {
		if err := tw.WriteHeader(&i.h); err != nil {
			t.Fatalf("write header %q: %v", i.h.Name, err)
		}
		if _, err := io.WriteString(tw, i.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func squeeze(t testing.TB, c compression, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	var w io.WriteCloser
	var err error
	switch c {
	case plain:
		return b
	case gzipped:
		w = gzip.NewWriter(&buf)
	case zstded:
		w, err = zstd.NewWriter(&buf)
	case xzed:
		w, err = xz.NewWriter(&buf)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// blobSum is the digest of b as manifests write it.
func blobSum(b []byte) v1.Hash {
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		panic(err) // reading memory does not fail
	}
	return h
}

// stored is a layer as a manifest has it.
type stored struct {
	tar  []byte
	blob []byte
	mt   types.MediaType
}

func asLayer(t testing.TB, c compression, tarred []byte) stored {
	mt := map[compression]types.MediaType{plain: types.OCIUncompressedLayer, gzipped: types.OCILayer, zstded: types.OCILayerZStd}[c]
	return stored{tarred, squeeze(t, c, tarred), mt}
}

// layoutSpec is an OCI layout with one image that a test may spoil.
type layoutSpec struct {
	layers   []stored
	config   func(*v1.ConfigFile)
	manifest func(*v1.Manifest)
	index    func(*v1.IndexManifest)
	blobs    func(name string, b []byte) []byte // nil result: leave it out
}

func testConfig() v1.Config {
	return v1.Config{
		User: "web:web", WorkingDir: "/srv", Entrypoint: []string{"/bin/app"}, Cmd: []string{"--serve"},
		Env: []string{"PATH=/bin:/usr/bin", "EMPTY=", "EQ=a=b", "junk"},
	}
}

var wantConfig = Config{
	User: "web:web", Cwd: "/srv", Entrypoint: []string{"/bin/app"}, Cmd: []string{"--serve"},
	Env: map[string]string{"PATH": "/bin:/usr/bin", "EMPTY": "", "EQ": "a=b"},
}

// writeLayout writes an OCI layout directory.
func writeLayout(t testing.TB, s layoutSpec) string {
	t.Helper()
	root := t.TempDir()
	put := func(b []byte) v1.Hash {
		h := blobSum(b)
		if s.blobs != nil {
			if b = s.blobs(h.String(), b); b == nil {
				return h
			}
		}
		writeFile(t, filepath.Join(root, "blobs", h.Algorithm, h.Hex), b)
		return h
	}
	cf := v1.ConfigFile{OS: "linux", Architecture: "amd64", Config: testConfig(), RootFS: v1.RootFS{Type: "layers"}}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	for _, l := range s.layers {
		cf.RootFS.DiffIDs = append(cf.RootFS.DiffIDs, blobSum(l.tar))
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: l.mt, Size: int64(len(l.blob)), Digest: put(l.blob)})
	}
	if s.config != nil {
		s.config(&cf)
	}
	raw := toJSON(t, cf)
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(raw)), Digest: put(raw)}
	if s.manifest != nil {
		s.manifest(&m)
	}
	raw = toJSON(t, m)
	idx := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{
		MediaType: types.OCIManifestSchema1, Size: int64(len(raw)), Digest: put(raw),
	}}}
	if s.index != nil {
		s.index(&idx)
	}
	writeFile(t, filepath.Join(root, layoutIndex), toJSON(t, idx))
	writeFile(t, filepath.Join(root, layoutMark), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return root
}

func toJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// packDir writes the files of a directory as a tar, names sorted.
func packDir(t testing.TB, root string) []byte {
	t.Helper()
	var items []item
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		if d.IsDir() {
			items = append(items, dir(rel+"/"))
			return nil
		}
		b, err := os.ReadFile(p)
		items = append(items, file(rel, string(b)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pack(t, items...)
}

// newStore opens a store and checks at the end of the test that builds left
// nothing in the work directory and the trash.
func newStore(t testing.TB, lim Limits) *Store {
	t.Helper()
	root := t.TempDir()
	s, err := Open(Params{Images: root + "/images", Work: root + "/work", Trash: root + "/trash", Limits: lim})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range []string{s.p.Work, s.p.Trash} {
			if left := names(t, d); len(left) > 0 {
				t.Errorf("left in %s: %q", d, left)
			}
		}
	})
	return s
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name())
	}
	return out
}

// mustBuild builds src for linux/amd64.
func mustBuild(t testing.TB, s *Store, src Source) *Image {
	t.Helper()
	if src.Platform == "" {
		src.Platform = "linux/amd64"
	}
	img, err := s.Build(testenv.Context(t), src, nil)
	if err != nil {
		t.Fatalf("build %s: %v", src, err)
	}
	img.Release()
	return img
}

func mustPath(t testing.TB, s *Store, d Digest) string {
	t.Helper()
	p, err := s.Path(d)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// fsck fails the test unless e2fsck finds nothing wrong.
func fsck(t testing.TB, path string) {
	t.Helper()
	out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput()
	if err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// debugfs runs one command on an image.
func debugfs(t testing.TB, path, format string, args ...any) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command("debugfs", "-R", fmt.Sprintf(format, args...), path)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("debugfs: %v\n%s", err, stderr.String())
	}
	return string(out)
}
