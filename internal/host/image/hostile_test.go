package image

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// refused builds src and wants it refused with all of words in the reason, and
// nothing left. The store's own cleanup looks at the work directory.
func refused(t *testing.T, s *Store, src Source, words ...string) {
	t.Helper()
	if src.Platform == "" {
		src.Platform = "linux/amd64"
	}
	img, err := s.Build(testenv.Context(t), src, nil)
	if err == nil {
		t.Fatalf("%s was built: %s", src, img.Digest)
	}
	if !fault.Is(err, fault.Invalid) {
		t.Errorf("class %v, want invalid: %v", fault.Of(err), err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the reason lacks %q: %v", w, err)
		}
	}
	if got := names(t, s.p.Images); len(got) > 0 {
		t.Errorf("images were left: %q", got)
	}
	if len(err.Error()) > 1000 {
		t.Errorf("the reason is %d bytes long", len(err.Error()))
	}
}

func TestHostileLayers(t *testing.T) {
	testenv.CheckGoroutines(t)
	xattrs := func(n, size int) item {
		return file("f", "").with(func(h *tar.Header) {
			for i := range n {
				h.PAXRecords[fmt.Sprintf("SCHILY.xattr.user.a%d", i)] = strings.Repeat("v", size)
			}
		})
	}
	for name, c := range map[string]struct {
		below []item // a layer below, if not nil
		items []item
		words []string
	}{
		"dot dot":                  {nil, []item{file("../etc/cron.d/evil", "x")}, []string{`"../etc/cron.d/evil"`, `".."`}},
		"dot dot inside":           {nil, []item{file("a/../../b", "x")}, []string{`".."`}},
		"absolute dot dot":         {nil, []item{file("/../b", "x")}, []string{`".."`}},
		"name of dots":             {nil, []item{dir("..")}, []string{`".."`}},
		"through a link":           {nil, []item{link(tar.TypeSymlink, "out", "/etc"), file("out/passwd", "x")}, []string{`"out/passwd"`, `"out"`, "symbolic link"}},
		"through a link deep":      {nil, []item{link(tar.TypeSymlink, "a/out", "../.."), file("a/out/b/c", "x")}, []string{`"a/out"`}},
		"through a link below":     {[]item{link(tar.TypeSymlink, "out", "/etc")}, []item{file("out/passwd", "x")}, []string{"layer 2 of 2", `"out"`}},
		"below a file":             {nil, []item{file("f", ""), file("f/g", "")}, []string{`"f/g"`, "is a file"}},
		"hard link outside":        {nil, []item{link(tar.TypeLink, "shadow", "../../etc/shadow")}, []string{`"shadow"`, `"../../etc/shadow"`}},
		"hard link to nothing":     {nil, []item{link(tar.TypeLink, "shadow", "/etc/shadow")}, []string{"not in the image"}},
		"hard link to later":       {nil, []item{link(tar.TypeLink, "b", "a"), file("a", "")}, []string{"not in the image before it"}},
		"hard link to removed":     {[]item{file("a", "")}, []item{link(tar.TypeLink, "b", "a"), file(".wh.a", "")}, []string{"not in the image"}},
		"hard link to a directory": {nil, []item{dir("d"), link(tar.TypeLink, "b", "d")}, []string{"directory"}},
		"hard link through a link": {nil, []item{dir("d"), file("d/f", ""), link(tar.TypeSymlink, "l", "d"), link(tar.TypeLink, "b", "l/f")}, []string{"not in the image"}},
		"hard link to the root":    {nil, []item{link(tar.TypeLink, "b", "/")}, []string{"root"}},
		"hard link as the root":    {nil, []item{file("a", ""), link(tar.TypeLink, "./", "a")}, []string{"root"}},
		"character device":         {nil, []item{special(tar.TypeChar, "dev/mem")}, []string{`"dev/mem"`, "device"}},
		"block device":             {nil, []item{special(tar.TypeBlock, "sda")}, []string{"device"}},
		"duplicate file":           {nil, []item{file("f", "1"), file("f", "2")}, []string{`"f"`, "twice"}},
		"duplicate by spelling":    {nil, []item{file("d/f", "1"), file("./d//./f", "2")}, []string{"twice"}},
		"file and directory":       {nil, []item{file("f", "1"), dir("f")}, []string{"twice"}},
		"file over made parent":    {nil, []item{file("d/f", "1"), file("d", "2")}, []string{`"d"`}},
		"file over touched lower":  {[]item{dir("d")}, []item{file("d/f", "1"), link(tar.TypeSymlink, "d", "x")}, []string{`"d"`}},
		"root is a link":           {nil, []item{link(tar.TypeSymlink, "./", "/etc")}, []string{"root"}},
		"root is a file":           {nil, []item{file("./.", "")}, []string{"root"}},
		"whiteout of nothing":      {nil, []item{file("a/.wh.", "")}, []string{"whiteout"}},
		"whiteout of dot dot":      {nil, []item{file("a/.wh...", "")}, []string{"whiteout"}},
		"below a whiteout":         {nil, []item{file(".wh.a/b", "")}, []string{"whiteout"}},
		"long name":                {nil, []item{file(strings.Repeat("n", 256), "")}, []string{"256 bytes", "255"}},
		"long path":                {nil, []item{file(strings.Repeat("dir/", 1100)+"f", "")}, []string{"4401 bytes"}},
		"long link":                {nil, []item{link(tar.TypeSymlink, "l", strings.Repeat("x", 5000))}, []string{`"l"`, "4095"}},
		"many attributes":          {nil, []item{xattrs(13, 1)}, []string{"13 extended attributes"}},
		"big attribute":            {nil, []item{xattrs(1, 4000)}, []string{"extended attributes"}},
		"negative owner":           {nil, []item{file("f", "").with(func(h *tar.Header) { h.Uid = -1 })}, []string{"owner"}},
		"huge owner":               {nil, []item{file("f", "").with(func(h *tar.Header) { h.Gid = 1<<32 - 1 })}, []string{"owner"}},
		"odd type":                 {nil, []item{{h: tar.Header{Name: "v", Typeflag: 'V', Format: tar.FormatGNU}}}, []string{`"V"`}},
		"lost+found":               {nil, []item{file("lost+found", "")}, []string{"lost+found"}},
	} {
		t.Run(name, func(t *testing.T) {
			var layers []stored
			if c.below != nil {
				layers = append(layers, asLayer(t, gzipped, pack(t, c.below...)))
			}
			layers = append(layers, asLayer(t, gzipped, pack(t, c.items...)))
			refused(t, newStore(t, Limits{}), Source{Path: writeLayout(t, layoutSpec{layers: layers})}, c.words...)
			if c.below == nil {
				refused(t, newStore(t, Limits{}), Source{Stream: bytes.NewReader(pack(t, c.items...))}, c.words...)
			}
		})
	}
}

// TestOddButHonest builds what looks strange and is in real images.
func TestOddButHonest(t *testing.T) {
	for name, c := range map[string]struct {
		items []item
		drop  bool
		want  string // of debugfs ls -p /, as paths
	}{
		"absolute names":       {[]item{dir("/etc/"), file("/etc/passwd", "")}, false, "etc"},
		"absolute link":        {[]item{link(tar.TypeSymlink, "a", "/../../etc/passwd")}, false, "a"},
		"directory twice":      {[]item{dir("d"), file("d/f", ""), dir("d/")}, false, "d"},
		"whiteout of no file":  {[]item{file(".wh.never", ""), file("a", "")}, false, "a"},
		"aufs bookkeeping":     {[]item{dir(".wh..wh.plnk"), file(".wh..wh.plnk/12.34", ""), file(".wh..wh.aufs", ""), file("a", "")}, false, "a"},
		"global header":        {[]item{{h: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}}, file("a", "")}, false, "a"},
		"devices of a rootfs":  {[]item{dir("dev"), special(tar.TypeChar, "dev/null"), special(tar.TypeBlock, "dev/x/sda")}, true, "dev"},
		"times before the era": {[]item{file("a", "").with(func(h *tar.Header) { h.ModTime = stamp.AddDate(-3000, 0, 0) })}, false, "a"},
		"nothing at all":       {[]item{dir("./")}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, Limits{})
			img := mustBuild(t, s, Source{Stream: bytes.NewReader(pack(t, c.items...)), Kind: RootTar, DropDevices: c.drop})
			p := mustPath(t, s, img.Digest)
			fsck(t, p)
			var got []string
			for _, l := range strings.Split(debugfs(t, p, "ls -p /"), "\n") {
				if f := strings.Split(l, "/"); len(f) > 5 && f[5] != "." && f[5] != ".." && f[5] != "lost+found" && f[5] != "" {
					got = append(got, f[5])
				}
			}
			if g := strings.Join(got, " "); g != c.want {
				t.Errorf("the root holds %q, want %q", g, c.want)
			}
		})
	}
}

func TestBombs(t *testing.T) {
	zeros := file("z", strings.Repeat("\x00", 8<<20))
	var many []item
	for i := range 300 {
		many = append(many, file(fmt.Sprint(i), ""))
	}
	var deep []item
	for i := range 10 {
		deep = append(deep, file(fmt.Sprintf("%d/", i)+strings.Repeat("d/", 30)+"f", ""))
	}
	for name, c := range map[string]struct {
		lim   Limits
		comp  compression
		items []item
		words []string
	}{
		"total size":      {Limits{UnpackedBytes: 4 << 20}, zstded, []item{zeros}, []string{"more than 4194304 bytes"}},
		"file size":       {Limits{FileBytes: 4 << 20}, zstded, []item{zeros}, []string{`"z"`, "limit for a file"}},
		"ratio gzip":      {Limits{RatioFloor: 1 << 20}, gzipped, []item{zeros}, []string{"250 times"}},
		"ratio zstd":      {Limits{RatioFloor: 1 << 20}, zstded, []item{zeros}, []string{"250 times"}},
		"ratio xz":        {Limits{RatioFloor: 1 << 20}, xzed, []item{zeros}, []string{"250 times"}},
		"entries":         {Limits{Entries: 299}, gzipped, many, []string{"more than 299 entries"}},
		"implied parents": {Limits{Entries: 300}, gzipped, deep, []string{"more than 300 files and directories"}},
		"path":            {Limits{PathBytes: 10}, gzipped, []item{file("01234567/89", "")}, []string{"limit is 10"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := squeeze(t, c.comp, pack(t, c.items...))
			refused(t, newStore(t, c.lim), Source{Stream: bytes.NewReader(b)}, c.words...)
		})
	}
	t.Run("trailing zeros", func(t *testing.T) {
		b := squeeze(t, gzipped, append(pack(t, file("a", "")), make([]byte, 8<<20)...))
		refused(t, newStore(t, Limits{RatioFloor: 1 << 20}), Source{Stream: bytes.NewReader(b)}, "times its stored size")
	})
	t.Run("sparse header", func(t *testing.T) {
		refused(t, newStore(t, Limits{RatioFloor: 1 << 20}), Source{Path: sparseTar(t, 1<<30)}, "times its stored size")
		refused(t, newStore(t, Limits{FileBytes: 1 << 20}), Source{Path: sparseTar(t, 1<<30)}, "limit for a file")
	})
	t.Run("layers", func(t *testing.T) {
		l := asLayer(t, gzipped, pack(t, file("a", "")))
		refused(t, newStore(t, Limits{Layers: 2}), Source{Path: writeLayout(t, layoutSpec{layers: []stored{l, l, l}})}, "3 layers")
	})
}

// TestSparseFile builds a GNU sparse file that is within the limits.
func TestSparseFile(t *testing.T) {
	s := newStore(t, Limits{})
	img := mustBuild(t, s, Source{Path: sparseTar(t, 1<<20)})
	if got := debugfs(t, mustPath(t, s, img.Digest), "cat /sparse"); got != "data"+strings.Repeat("\x00", 1<<20-4) {
		t.Errorf("the file came back wrong, %d bytes", len(got))
	}
}

// sparseTar writes a PAX sparse file (format 1.0) of the given logical size:
// the Go tar writer cannot make one, so its header is made by hand.
func sparseTar(t *testing.T, size int64) string {
	t.Helper()
	sparseMap := "1\n0\n4\n"
	body := sparseMap + strings.Repeat("\x00", 512-len(sparseMap)) + "data"
	rec := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sparse", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(kv) + 3
		for n != len(fmt.Sprint(n))+len(kv)+2 {
			n++
		}
		rec += fmt.Sprintf("%d %s\n", n, kv)
	}
	head := pack(t, file("PaxHeaders.0/sparse", rec))
	head[156] = tar.TypeXHeader
	copy(head[148:156], "        ")
	sum := 0
	for _, b := range head[:512] {
		sum += int(b)
	}
	copy(head[148:156], fmt.Sprintf("%06o\x00 ", sum))
	out := filepath.Join(t.TempDir(), "sparse.tar")
	writeFile(t, out, append(head[:1024:1024], pack(t, file("GNUSparseFile.0/sparse", body))...))
	return out
}

// TestSpoiledBytes spoils archives as bytes.
func TestSpoiledBytes(t *testing.T) {
	noise := make([]byte, 100_000)
	rand.Read(noise)
	root := pack(t, dir("d"), file("d/f", string(noise)))
	for _, c := range []compression{plain, gzipped, zstded, xzed} {
		b := squeeze(t, c, root)
		for what, bad := range map[string][]byte{
			"half":            b[:len(b)/2],
			"without its end": b[:len(b)-1030],
			"with garbage":    append(bytes.Clone(b), "garbage behind"...),
			"flipped":         func() []byte { x := bytes.Clone(b); x[30] ^= 0x55; return x }(),
			"its head only":   b[:5],
		} {
			t.Run(string(c)+" "+what, func(t *testing.T) {
				refused(t, newStore(t, Limits{}), Source{Stream: bytes.NewReader(bad)})
				refused(t, newStore(t, Limits{}), Source{Stream: bytes.NewReader(bad), Kind: RootTar})
			})
		}
	}
	for what, b := range map[string][]byte{"empty": nil, "text": []byte("hello"), "zeros": make([]byte, 4096), "noise": noise} {
		t.Run(what, func(t *testing.T) { refused(t, newStore(t, Limits{}), Source{Stream: bytes.NewReader(b)}) })
	}
}

func TestSpoiledLayouts(t *testing.T) {
	good := asLayer(t, gzipped, pack(t, file("a", "x")))
	other := asLayer(t, gzipped, pack(t, file("b", "x")))
	layers := []stored{good}
	arm := v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	spoil := func(h v1.Hash, with []byte) func(string, []byte) []byte {
		return func(name string, b []byte) []byte {
			if name == h.String() {
				return with
			}
			return b
		}
	}
	for name, c := range map[string]struct {
		spec  layoutSpec
		words []string
	}{
		"other bytes, same length": {layoutSpec{blobs: spoil(blobSum(good.blob), append(bytes.Clone(good.blob[:len(good.blob)-1]), good.blob[len(good.blob)-1]^1))}, []string{"layer 1 of 1"}},
		"other layer":              {layoutSpec{blobs: spoil(blobSum(good.blob), other.blob)}, []string{"layer 1 of 1"}},
		"cut layer":                {layoutSpec{blobs: spoil(blobSum(good.blob), good.blob[:len(good.blob)/2])}, []string{"cut short"}},
		"longer layer":             {layoutSpec{blobs: spoil(blobSum(good.blob), append(bytes.Clone(good.blob), good.blob...))}, []string{"longer than"}},
		"missing layer":            {layoutSpec{blobs: spoil(blobSum(good.blob), nil)}, []string{"lacks its blob"}},
		"wrong diff id":            {layoutSpec{config: func(c *v1.ConfigFile) { c.RootFS.DiffIDs[0] = blobSum(nil) }}, []string{"unpacked digest", blobSum(good.tar).String()}},
		"too few diff ids":         {layoutSpec{config: func(c *v1.ConfigFile) { c.RootFS.DiffIDs = nil }}, []string{"1 layers", "config 0"}},
		"wrong size":               {layoutSpec{manifest: func(m *v1.Manifest) { m.Layers[0].Size++ }}, []string{"its manifest says"}},
		"wrong digest":             {layoutSpec{manifest: func(m *v1.Manifest) { m.Layers[0].Digest = blobSum(nil) }}, []string{"lacks its blob"}},
		"foreign layer":            {layoutSpec{manifest: func(m *v1.Manifest) { m.Layers[0].URLs = []string{"https://example.com/l"} }}, []string{"foreign layer"}},
		"foreign type":             {layoutSpec{manifest: func(m *v1.Manifest) { m.Layers[0].MediaType = types.DockerForeignLayer }}, []string{"foreign layer"}},
		"encrypted layer":          {layoutSpec{manifest: func(m *v1.Manifest) { m.Layers[0].MediaType += "+encrypted" }}, []string{"+encrypted"}},
		"artifact":                 {layoutSpec{manifest: func(m *v1.Manifest) { m.Config.MediaType = "application/vnd.oci.empty.v1+json" }}, []string{"artifact", "no container image"}},
		"artifact type":            {layoutSpec{manifest: func(m *v1.Manifest) { m.ArtifactType = "application/vnd.example.sbom" }}, []string{"application/vnd.example.sbom"}},
		"other platform":           {layoutSpec{config: func(c *v1.ConfigFile) { c.Architecture = "s390x" }}, []string{"no image for linux/amd64", "linux/s390x"}},
		"index without the platform": {layoutSpec{index: func(i *v1.IndexManifest) {
			i.Manifests[0].Platform = &arm
			i.Manifests = append(i.Manifests, i.Manifests[0])
		}}, []string{"no image for linux/amd64", "linux/arm64/v8"}},
		"several names": {layoutSpec{index: func(i *v1.IndexManifest) {
			a, b := i.Manifests[0], i.Manifests[0]
			a.Annotations = map[string]string{"org.opencontainers.image.ref.name": "one"}
			b.Annotations = map[string]string{"org.opencontainers.image.ref.name": "two"}
			i.Manifests = []v1.Descriptor{a, b}
		}}, []string{"several images", "one, two"}},
		"empty index":      {layoutSpec{index: func(i *v1.IndexManifest) { i.Manifests = nil }}, []string{"no image"}},
		"huge manifest":    {layoutSpec{index: func(i *v1.IndexManifest) { i.Manifests[0].Size = 1 << 40 }}, []string{"limit"}},
		"schema 1":         {layoutSpec{manifest: func(m *v1.Manifest) { m.SchemaVersion = 1 }}, []string{"schema 1"}},
		"zero byte in env": {layoutSpec{config: func(c *v1.ConfigFile) { c.Config.Env = []string{"A=\x00"} }}, []string{"zero byte"}},
		"relative cwd":     {layoutSpec{config: func(c *v1.ConfigFile) { c.Config.WorkingDir = "srv" }}, []string{"absolute"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.spec.layers = layers
			root := writeLayout(t, c.spec)
			refused(t, newStore(t, Limits{}), Source{Path: root}, c.words...)
			refused(t, newStore(t, Limits{}), Source{Stream: bytes.NewReader(packDir(t, root))}, c.words...)
		})
	}
	t.Run("no layout", func(t *testing.T) {
		refused(t, newStore(t, Limits{}), Source{Path: t.TempDir()}, "no OCI layout", "give a tar")
	})
	t.Run("blob link out of the layout", func(t *testing.T) {
		root := writeLayout(t, layoutSpec{layers: layers})
		blob := filepath.Join(root, "blobs", "sha256", blobSum(good.blob).Hex)
		outside := filepath.Join(t.TempDir(), "blob")
		if err := os.Rename(blob, outside); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outside, blob); err != nil {
			t.Fatal(err)
		}
		if _, err := newStore(t, Limits{}).Build(testenv.Context(t), Source{Path: root, Platform: "linux/amd64"}, nil); err == nil {
			t.Error("a link that leads out of the layout was followed")
		}
	})
}

func TestSpoiledSaves(t *testing.T) {
	root := pack(t, file("a", "x"))
	good := oldSave(t, root)
	if !bytes.Contains(good, []byte("VERSION")) {
		t.Fatal("the archive is not as expected")
	}
	id := strings.Repeat("1", 64)
	cfg := string(toJSON(t, v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{DiffIDs: []v1.Hash{blobSum(root)}}}))
	save := func(images ...savedImage) item { return file("manifest.json", string(toJSON(t, images))) }
	one := savedImage{Config: "c.json", RepoTags: []string{"a:1"}, Layers: []string{id + "/layer.tar"}}
	for name, c := range map[string]struct {
		items []item
		image string
		words []string
	}{
		"no layer":       {[]item{save(one), file("c.json", cfg)}, "", []string{"lacks layer 1 of 1"}},
		"no config":      {[]item{save(one)}, "", []string{"lacks the image's config"}},
		"wrong layer":    {[]item{save(one), file("c.json", cfg), file(id+"/layer.tar", string(pack(t, file("b", ""))))}, "", []string{"unpacked digest"}},
		"layer is a dot": {[]item{save(one), file("c.json", cfg), link(tar.TypeSymlink, id+"/layer.tar", "layer.tar")}, "", []string{"lacks layer"}},
		"several":        {[]item{save(one, savedImage{RepoTags: []string{"b:1"}})}, "", []string{"several", "a:1, b:1"}},
		"unknown name":   {[]item{save(one)}, "b:2", []string{`"b:2"`, "a:1"}},
		"no images":      {[]item{save()}, "", []string{"no image"}},
		"not a list":     {[]item{file("manifest.json", "{}")}, "", []string{"not as docker save writes it"}},
		"twice":          {[]item{save(one), save(one)}, "", []string{"twice"}},
		"dot dot":        {[]item{save(one), file("../c.json", cfg)}, "", []string{`".."`}},
		"neither":        {[]item{file("repositories", "{}")}, "", []string{"neither"}},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, newStore(t, Limits{}), Source{Stream: bytes.NewReader(pack(t, c.items...)), Image: c.image}, c.words...)
		})
	}
}
