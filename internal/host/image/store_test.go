package image

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func none(Digest) bool { return false }

func TestHoldAndCollect(t *testing.T) {
	s := newStore(t, Limits{})
	ctx := testenv.Context(t)
	img, err := s.Build(ctx, Source{Stream: bytes.NewReader(pack(t, file("a", "")))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := img.Digest
	release, err := s.Hold(d)
	if err != nil {
		t.Fatal(err)
	}
	collect := func(keep func(Digest) bool) int {
		t.Helper()
		gone, err := s.Collect(ctx, keep)
		if err != nil {
			t.Fatal(err)
		}
		return len(gone)
	}
	if n := collect(none); n != 0 {
		t.Fatal("a new image was collected before its builder let it go")
	}
	img.Release()
	img.Release() // twice is once
	if n := collect(none); n != 0 {
		t.Fatal("a held image was collected")
	}
	release()
	if n := collect(func(x Digest) bool { return x == d }); n != 0 {
		t.Fatal("an image in use was collected")
	}
	if n := collect(none); n != 1 {
		t.Fatal("an unused image stayed")
	}
	if _, err := s.Get(d); !fault.Is(err, fault.NotFound) {
		t.Errorf("get a collected image: %v", err)
	}
	if _, err := s.Hold(d); !fault.Is(err, fault.NotFound) {
		t.Errorf("hold a collected image: %v", err)
	}
	if _, err := s.Get("../../etc"); !fault.Is(err, fault.Invalid) {
		t.Errorf("get no digest: %v", err)
	}
}

func TestDamagedImages(t *testing.T) {
	s := newStore(t, Limits{})
	root := pack(t, file("a", ""))
	img := mustBuild(t, s, Source{Stream: bytes.NewReader(root)})
	dir := s.dir(img.Digest)
	manifest := filepath.Join(dir, manifestName)
	for what, spoil := range map[string]func() error{
		"no JSON":       func() error { return os.WriteFile(manifest, []byte("{"), 0o600) },
		"other version": func() error { return os.WriteFile(manifest, []byte(`{"version":99}`), 0o600) },
		"cut file":      func() error { return os.Truncate(filepath.Join(dir, rootfsName), 5) },
		"no file":       func() error { return os.Remove(filepath.Join(dir, rootfsName)) },
	} {
		if err := spoil(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		images, broken, err := s.List()
		if len(images) != 0 || len(broken) != 1 || err != nil {
			t.Errorf("%s: list has %d images and %v, %v", what, len(images), broken, err)
		}
		mustBuild(t, s, Source{Stream: bytes.NewReader(root)})
		if images, broken, err := s.List(); len(images) != 1 || len(broken) != 0 || err != nil {
			t.Errorf("%s: not mended by a build: %v, %v", what, broken, err)
		}
	}
}

func TestReclaim(t *testing.T) {
	s := newStore(t, Limits{})
	mine := filepath.Join(s.p.Trash, trashPrefix+"1", "x")
	others := filepath.Join(s.p.Trash, "sandbox-1")
	for _, d := range []string{filepath.Join(s.p.Work, "build-1", "image"), mine, others} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Reclaim(testenv.Context(t)); err != nil {
		t.Fatal(err)
	}
	if got := names(t, s.p.Trash); len(got) != 1 || got[0] != "sandbox-1" {
		t.Errorf("the trash holds %q", got)
	}
	if err := os.Remove(others); err != nil {
		t.Fatal(err)
	}
}

// TestBuildsAtOnce builds the same and different images at the same time while
// others are collected.
func TestBuildsAtOnce(t *testing.T) {
	testenv.CheckGoroutines(t)
	s := newStore(t, Limits{})
	ctx := testenv.Context(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			img, err := s.Build(ctx, Source{Stream: bytes.NewReader(pack(t, file("a", strings.Repeat("x", i%2))))}, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer img.Release()
			if _, err := s.Collect(ctx, none); err != nil {
				t.Error(err)
			}
			if _, err := s.Path(img.Digest); err != nil {
				t.Errorf("a held image is gone: %v", err)
			}
		})
	}
	wg.Wait()
	if _, err := s.Collect(ctx, none); err != nil {
		t.Error(err)
	}
	if got := names(t, s.p.Images); len(got) != 0 {
		t.Errorf("left %q", got)
	}
}
