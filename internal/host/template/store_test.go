package template

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/image"
	"github.com/hutch-run/hutch/internal/testenv"
)

// rootTar is a root filesystem with one file.
func rootTar(t testing.TB, body string) io.Reader {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	if err := tw.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tw, body); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

func unused() map[string]bool { return nil }

func newStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(Params{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range []string{"build", "trash"} {
			if es, err := os.ReadDir(filepath.Join(s.p.Root, d)); err != nil || len(es) > 0 {
				t.Errorf("left in %s: %v, %v", d, es, err)
			}
		}
	})
	return s
}

func mustImport(t testing.TB, s *Store, name, body string) Template {
	t.Helper()
	tm, err := s.Import(testenv.Context(t), ImportParams{Name: name, Source: image.Source{Stream: rootTar(t, body)}})
	if err != nil {
		t.Fatal(err)
	}
	return tm
}

func TestImportAndRead(t *testing.T) {
	s := newStore(t)
	cfg := image.Config{Env: map[string]string{"A": "1", "B": "2"}, User: "web", Cwd: "/srv", Entrypoint: []string{"/e"}, Cmd: []string{"c"}}
	got, err := s.Import(testenv.Context(t), ImportParams{
		Name: "app", Source: image.Source{Stream: rootTar(t, "x"), Label: "upload", Config: &cfg},
		Overrides: Overrides{Env: map[string]string{"B": "3", "C": "4"}, Cwd: "/opt", Cmd: []string{"/run"}, VCPUs: 2, MemoryMB: 256},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Template{
		Version: 1, Name: "app", Source: "upload", Platform: "linux/" + runtime.GOARCH, Env: map[string]string{"A": "1", "B": "3", "C": "4"},
		User: "web", Cwd: "/opt", Cmd: []string{"/run"}, VCPUs: 2, MemoryMB: 256,
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Template{}, "ImageDigest", "SizeBytes", "StoredBytes", "CreatedAt")); diff != "" {
		t.Error(diff)
	}
	read, path, err := s.Resolve("app")
	if diff := cmp.Diff(got, read); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Size() != got.SizeBytes || path != filepath.Join(s.p.Root, "images", strings.TrimPrefix(got.ImageDigest, "sha256:"), "rootfs.ext4") {
		t.Errorf("%s: %v, %v", path, fi, err)
	}
	if other, err := s.Image(got.ImageDigest); err != nil || other != path {
		t.Errorf("%s, %v", other, err)
	}
}

func TestNotThere(t *testing.T) {
	s := newStore(t)
	for _, name := range []string{"none", "", "../images", "UPPER", strings.Repeat("a", 129)} {
		_, err := s.Get(name)
		if !fault.Is(err, fault.NotFound) {
			t.Errorf("get %q: %v", name, err)
		}
		if err := s.Remove(name); !fault.Is(err, fault.NotFound) {
			t.Errorf("remove %q: %v", name, err)
		}
	}
	_, err := s.Get("none")
	for _, w := range []string{`"none"`, "hutch template ls", "hutch template build"} {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error lacks %q: %v", w, err)
		}
	}
	if _, err := s.Image("sha256:" + strings.Repeat("0", 64)); !fault.Is(err, fault.NotFound) {
		t.Errorf("an image that is not there: %v", err)
	}
	if err := s.Put(Template{Name: "t", ImageDigest: "sha256:" + strings.Repeat("0", 64)}); !fault.Is(err, fault.NotFound) {
		t.Errorf("a template without its image: %v", err)
	}
}

func TestBadImports(t *testing.T) {
	s := newStore(t)
	src := func() image.Source { return image.Source{Stream: rootTar(t, "x")} }
	for what, c := range map[string]struct {
		p     ImportParams
		field string
	}{
		"name":       {ImportParams{Name: "a/b", Source: src()}, "name"},
		"both":       {ImportParams{Name: "a", Recipe: "minimal", Source: src()}, "source"},
		"neither":    {ImportParams{Name: "a"}, "source"},
		"cwd":        {ImportParams{Name: "a", Source: src(), Overrides: Overrides{Cwd: "srv"}}, "cwd"},
		"env":        {ImportParams{Name: "a", Source: src(), Overrides: Overrides{Env: map[string]string{"A=B": ""}}}, "env"},
		"zero bytes": {ImportParams{Name: "a", Source: src(), Overrides: Overrides{Cmd: []string{"\x00"}}}, "defaults"},
		"memory":     {ImportParams{Name: "a", Source: src(), Overrides: Overrides{MemoryMB: -1}}, "memory_mb"},
		"platform":   {ImportParams{Name: "a", Recipe: "minimal", Source: image.Source{Platform: "linux/s390x"}}, "platform"},
	} {
		_, err := s.Import(testenv.Context(t), c.p)
		var f *fault.Error
		if !fault.Is(err, fault.Invalid) || !errors.As(err, &f) || f.Field == "" && !errors.As(f.Err, &f) {
			t.Errorf("%s: %v", what, err)
		} else if f.Field != c.field {
			t.Errorf("%s: field %q, want %q", what, f.Field, c.field)
		}
	}
	if _, err := s.Import(testenv.Context(t), ImportParams{Name: "a", Recipe: "none"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("an unknown recipe: %v", err)
	}
	if _, err := s.Import(testenv.Context(t), ImportParams{Name: "a", Source: image.Source{Stream: strings.NewReader("no tar")}}); !fault.Is(err, fault.Invalid) {
		t.Errorf("no tar: %v", err)
	}
	if ts, broken, err := s.List(); len(ts)+len(broken) > 0 || err != nil {
		t.Errorf("left %v, %v, %v", ts, broken, err)
	}
}

func TestReplaceRemoveCollect(t *testing.T) {
	s := newStore(t)
	ctx := testenv.Context(t)
	one, two, same := mustImport(t, s, "a", "1"), mustImport(t, s, "b", "2"), mustImport(t, s, "c", "1")
	if one.ImageDigest != same.ImageDigest || one.ImageDigest == two.ImageDigest {
		t.Fatalf("digests %s, %s, %s", one.ImageDigest, two.ImageDigest, same.ImageDigest)
	}
	collect := func(used ...string) []string {
		t.Helper()
		m := map[string]bool{}
		for _, u := range used {
			m[u] = true
		}
		gone, err := s.Collect(ctx, func() map[string]bool { return m })
		if err != nil {
			t.Fatal(err)
		}
		return gone
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	if gone := collect(); len(gone) != 0 {
		t.Errorf("collected %v, which another template names", gone)
	}
	three := mustImport(t, s, "c", "3") // moves on from image 1
	if gone := collect(one.ImageDigest); len(gone) != 0 {
		t.Errorf("collected %v, which a sandbox uses", gone)
	}
	if gone := collect(); !slices.Equal(gone, []string{one.ImageDigest}) {
		t.Errorf("collected %v, want %s", gone, one.ImageDigest)
	}
	_, _, release, err := s.Hold("b")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("b"); err != nil {
		t.Fatal(err)
	}
	if gone := collect(); len(gone) != 0 {
		t.Errorf("collected %v, which is held", gone)
	}
	release()
	if gone := collect(); !slices.Equal(gone, []string{two.ImageDigest}) {
		t.Errorf("collected %v, want %s", gone, two.ImageDigest)
	}
	ts, _, err := s.List()
	if err != nil || len(ts) != 1 || ts[0].Name != "c" || ts[0].ImageDigest != three.ImageDigest {
		t.Errorf("%v, %v", ts, err)
	}
}

// TestCollectAsksWhileNothingIsReleased has a holder become a user and release
// in the middle of a collection. What it told of itself comes too late for the
// answer, so its release must come too late as well.
func TestCollectAsksWhileNothingIsReleased(t *testing.T) {
	s := newStore(t)
	tm := mustImport(t, s, "a", "1")
	_, _, release, err := s.Hold("a")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	released := make(chan struct{})
	other := mustImport(t, s, "b", "2") // so that there is one to ask about
	if err := s.Remove("b"); err != nil {
		t.Fatal(err)
	}
	gone, err := s.Collect(testenv.Context(t), func() map[string]bool {
		go func() { release(); close(released) }()
		select {
		case <-released:
			t.Error("released in the middle of a collection")
		case <-time.After(10 * time.Millisecond): // it waits for the collection
		}
		return nil
	})
	if err != nil || !slices.Equal(gone, []string{other.ImageDigest}) {
		t.Errorf("collected %v, %v, want %s", gone, err, other.ImageDigest)
	}
	<-released
	if gone, err := s.Collect(testenv.Context(t), unused); err != nil || !slices.Equal(gone, []string{tm.ImageDigest}) {
		t.Errorf("collected %v, %v, want %s", gone, err, tm.ImageDigest)
	}
}

// TestDamagedTemplate spoils one template: the others work, nothing is
// collected, and it can be removed or made again.
func TestDamagedTemplate(t *testing.T) {
	s := newStore(t)
	mustImport(t, s, "good", "1")
	for what, spoil := range map[string]string{
		"no JSON": "{", "newer": `{"version":2,"name":"bad"}`, "other name": `{"version":1,"name":"good"}`, "no digest": `{"version":1,"name":"bad"}`,
	} {
		bad := mustImport(t, s, "bad", "2")
		file := filepath.Join(s.dir("bad"), templateName)
		if err := os.WriteFile(file, []byte(spoil), 0o600); err != nil {
			t.Fatal(err)
		}
		ts, broken, err := s.List()
		if err != nil || len(ts) != 1 || len(broken) != 1 || !strings.Contains(broken[0].Error(), "bad") {
			t.Errorf("%s: list %v, %v, %v", what, ts, broken, err)
		}
		if _, err := s.Get("bad"); err == nil || fault.Is(err, fault.NotFound) {
			t.Errorf("%s: get: %v", what, err)
		}
		if _, err := s.Get("good"); err != nil {
			t.Errorf("%s: the good one: %v", what, err)
		}
		if gone, err := s.Collect(testenv.Context(t), unused); err == nil || len(gone) > 0 {
			t.Errorf("%s: collected %v, %v", what, gone, err)
		}
		if err := s.Remove("bad"); err != nil {
			t.Errorf("%s: remove: %v", what, err)
		}
		if gone, err := s.Collect(testenv.Context(t), unused); err != nil || !slices.Equal(gone, []string{bad.ImageDigest}) {
			t.Errorf("%s: collected %v, %v", what, gone, err)
		}
	}
	// What a crash in the middle of a Put leaves is no template.
	if err := errors.Join(os.Mkdir(s.dir("half"), 0o755), os.WriteFile(filepath.Join(s.dir("half"), ".template.json123"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if ts, broken, err := s.List(); len(ts) != 1 || len(broken) != 0 || err != nil {
		t.Errorf("after a crash: %v, %v, %v", ts, broken, err)
	}
	if _, err := s.Get("half"); !fault.Is(err, fault.NotFound) {
		t.Errorf("after a crash: %v", err)
	}
}

// gate is a stream that tells when it is read and then waits.
type gate struct {
	io.Reader
	started chan<- string
	name    string
	open    <-chan struct{}
	once    sync.Once
}

func (g *gate) Read(p []byte) (int, error) {
	g.once.Do(func() { g.started <- g.name; <-g.open })
	return g.Reader.Read(p)
}

// TestImportsAtOnce runs several imports: one at a time for a name, two at a
// time in all.
func TestImportsAtOnce(t *testing.T) {
	testenv.CheckGoroutines(t)
	s := newStore(t)
	started, open := make(chan string, 8), make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := map[string]int{}
	for _, name := range []string{"a", "a", "a", "b", "c"} {
		wg.Go(func() {
			_, err := s.Import(testenv.Context(t), ImportParams{Name: name, Source: image.Source{
				Stream: &gate{Reader: rootTar(t, name), started: started, name: name, open: open},
			}})
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			done[name]++
		})
	}
	first, second := <-started, <-started
	if first == second {
		t.Errorf("%s is made twice at the same time", first)
	}
	// A third has no slot; whether it would come is not waited for, but the
	// slots are all taken now.
	if len(s.slots) != 2 {
		t.Errorf("%d slots are taken, want 2", len(s.slots))
	}
	ctx, cancel := context.WithCancelCause(testenv.Context(t))
	gone := errors.New("the caller left")
	cancel(gone)
	for _, name := range []string{first, "other"} { // waits for the name, and for a slot
		if _, err := s.Import(ctx, ImportParams{Name: name, Source: image.Source{Stream: rootTar(t, "")}}); !errors.Is(err, gone) {
			t.Errorf("%s, cancelled while it waits: %v", name, err)
		}
	}
	close(open)
	wg.Wait()
	if want := map[string]int{"a": 3, "b": 1, "c": 1}; !maps.Equal(done, want) {
		t.Errorf("done %v, want %v", done, want)
	}
	if ts, _, err := s.List(); len(ts) != 3 || err != nil {
		t.Errorf("%v, %v", ts, err)
	}
}

func TestReclaim(t *testing.T) {
	s := newStore(t)
	for _, d := range []string{"build/recipe-1/tmp", "build/build-2/image", "trash/template-3/x", "trash/image-4/y"} {
		if err := os.MkdirAll(filepath.Join(s.p.Root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Reclaim(testenv.Context(t)); err != nil {
		t.Fatal(err)
	}
}

// TestImportRecipe makes the default template for real.
func TestImportRecipe(t *testing.T) {
	testenv.RequireRoot(t)
	s := newStore(t)
	var mu sync.Mutex
	steps := map[string]bool{}
	got, err := s.Import(testenv.Context(t), ImportParams{Name: "minimal", Recipe: "minimal", Progress: func(step string, _, _ int64) {
		mu.Lock()
		defer mu.Unlock()
		steps[step] = true
	}})
	if err != nil {
		t.Fatal(err)
	}
	if got.Source != "recipe:minimal" || got.User != "root" || got.Env["PATH"] == "" || !slices.Equal(got.Cmd, []string{"/bin/sh"}) || got.Platform != "linux/"+runtime.GOARCH {
		t.Errorf("%+v", got)
	}
	if !steps["putting minimal together"] || !steps["writing files"] {
		t.Errorf("steps told: %v", slices.Sorted(maps.Keys(steps)))
	}
}
