package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func disks(t *testing.T, dir string) *Disks {
	t.Helper()
	d := New(Params{BlankDir: dir, Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(d.Close)
	return d
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	n, err := Allocated(path)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fsck fails the test unless e2fsck finds nothing to mind.
func fsck(t *testing.T, path string) {
	t.Helper()
	out, err := exec.CommandContext(testenv.Context(t), "e2fsck", "-fn", path).CombinedOutput()
	if err != nil {
		t.Errorf("e2fsck %s: %v\n%s", path, err, out)
	}
}

func TestCreate(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx := testenv.Context(t)
	dir := t.TempDir()
	d := disks(t, dir)
	for _, size := range []int{MinSizeMB, 100, 5120, 100 << 10} {
		path := filepath.Join(t.TempDir(), "data.img")
		if err := d.Create(ctx, path, size); err != nil {
			t.Fatalf("%d MiB: %v", size, err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() != int64(size)<<20 {
			t.Errorf("%d MiB: file has %d bytes", size, info.Size())
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%d MiB: mode %v", size, info.Mode())
		}
		// Group descriptors and bitmaps grow with the disk, data does not.
		if got, most := allocated(t, path), int64(1<<20+size*64); got > most {
			t.Errorf("%d MiB: takes %d bytes, want at most %d", size, got, most)
		}
		if err := d.Sync(path); err != nil {
			t.Error(err)
		}
		fsck(t, path)
	}
	if err := d.Sync(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("sync of nothing: %v", err)
	}
}

// Inode tables that count as cleared spare every guest writing them, which
// would fill the holes.
func TestCreatedDiskNeedsNoInitialisation(t *testing.T) {
	d := disks(t, t.TempDir())
	path := filepath.Join(t.TempDir(), "data.img")
	if err := d.Create(testenv.Context(t), path, 1024); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(testenv.Context(t), "dumpe2fs", path).CombinedOutput()
	if err != nil {
		t.Fatalf("dumpe2fs: %v\n%s", err, out)
	}
	groups, zeroed := len(regexp.MustCompile(`(?m)^Group \d+:`).FindAll(out, -1)), bytes.Count(out, []byte("ITABLE_ZEROED"))
	if groups == 0 || groups != zeroed {
		t.Errorf("%d of %d inode tables count as cleared", zeroed, groups)
	}
	for _, want := range []string{"hutch-data", "Reserved block count:     0\n", "has_journal", "metadata_csum"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("dumpe2fs does not tell %q", want)
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	ctx := testenv.Context(t)
	d := disks(t, t.TempDir())
	for _, size := range []int{-1, 0, MinSizeMB - 1, MaxSizeMB + 1} {
		if err := d.Create(ctx, filepath.Join(t.TempDir(), "x"), size); !fault.Is(err, fault.Invalid) {
			t.Errorf("%d MiB: %v, want invalid", size, err)
		}
	}
	there := filepath.Join(t.TempDir(), "there")
	if err := os.WriteFile(there, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(there, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{there, link} {
		if err := d.Create(ctx, path, MinSizeMB); !fault.Is(err, fault.Exists) {
			t.Errorf("create over %s: %v, want exists", path, err)
		}
	}
	if b, err := os.ReadFile(there); err != nil || string(b) != "precious" {
		t.Errorf("the file now holds %q (%v)", b, err)
	}
}

func TestNeverFormatsData(t *testing.T) {
	d := disks(t, t.TempDir())
	for name, at := range map[string]int64{"start": 0, "middle": 31<<20 + 5, "end": 64<<20 - 1} {
		f, err := os.Create(filepath.Join(t.TempDir(), name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte{1}, at); err != nil {
			t.Fatal(err)
		}
		if err := d.format(testenv.Context(t), f, 64<<20); err == nil || !strings.Contains(err.Error(), "refuse to format") {
			t.Errorf("data at the %s: %v, want a refusal", name, err)
		}
		var b [1]byte
		if _, err := f.ReadAt(b[:], at); err != nil || b[0] != 1 {
			t.Errorf("data at the %s is lost: %v %v", name, b, err)
		}
	}
}

func TestManyCreatesFormatOnce(t *testing.T) {
	testenv.CheckGoroutines(t)
	count := filepath.Join(t.TempDir(), "count")
	mkfs := filepath.Join(t.TempDir(), "mkfs")
	script := fmt.Sprintf("#!/bin/sh\necho x >> %s\nexec mkfs.ext4 \"$@\"\n", count)
	if err := os.WriteFile(mkfs, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	d := New(Params{BlankDir: t.TempDir(), Mkfs: mkfs, Log: slog.New(slog.DiscardHandler)})
	defer d.Close()
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := d.Create(testenv.Context(t), filepath.Join(dir, fmt.Sprint(i)), 128); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if b, err := os.ReadFile(count); err != nil || string(b) != "x\n" {
		t.Errorf("formatted %d times (%v), want once", len(b)/2, err)
	}
}

func TestFailedFormatLeavesNothing(t *testing.T) {
	mkfs := filepath.Join(t.TempDir(), "mkfs")
	if err := os.WriteFile(mkfs, []byte("#!/bin/sh\necho one >&2\necho no good >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d := New(Params{BlankDir: dir, Mkfs: mkfs, Log: slog.New(slog.DiscardHandler)})
	defer d.Close()
	path := filepath.Join(t.TempDir(), "x")
	err := d.Create(testenv.Context(t), path, 128)
	if err == nil || !strings.Contains(err.Error(), "no good") {
		t.Errorf("got %v, want the last words of mkfs", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v (%v)", left, err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("disk: %v, want none", err)
	}
}

func TestBrokenBlankIsMadeAnew(t *testing.T) {
	dir := t.TempDir()
	d := disks(t, dir)
	for _, name := range []string{"128" + blankSuffix, "64-v0.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("rubbish"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "x")
	if err := d.Create(testenv.Context(t), path, 128); err != nil {
		t.Fatal(err)
	}
	fsck(t, path)
	if _, err := os.Lstat(filepath.Join(dir, "64-v0.img")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("blank of an old version: %v, want it gone", err)
	}
}

func TestBlanksAreBounded(t *testing.T) {
	dir := t.TempDir()
	d := disks(t, dir)
	for i := range 2 * maxBlanks {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(1000+i)+blankSuffix), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Create(testenv.Context(t), filepath.Join(t.TempDir(), "x"), 128); err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != maxBlanks {
		t.Errorf("%d blank images (%v), want %d", len(names), err, maxBlanks)
	}
}

// scatter makes a sparse file with data at its ends and in its middle.
func scatter(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	src := rand.NewChaCha8([32]byte{1})
	for _, at := range []int64{0, 5 << 20, size/2 + 12345, size - 70000} {
		b := make([]byte, 70000)
		src.Read(b)
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
}

func digest(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestCloneKeepsContentAndHoles(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	scatter(t, src, 300<<20+17)
	d := disks(t, t.TempDir())
	if err := d.Clone(testenv.Context(t), src, dst); err != nil {
		t.Fatal(err)
	}
	if digest(t, src) != digest(t, dst) {
		t.Error("the clone differs")
	}
	if got, most := allocated(t, dst), allocated(t, src)+64<<10; got > most {
		t.Errorf("the clone takes %d bytes, want at most %d", got, most)
	}
	if err := d.Clone(testenv.Context(t), src, dst); !fault.Is(err, fault.Exists) {
		t.Errorf("clone over a file: %v, want exists", err)
	}
	if err := d.Clone(testenv.Context(t), dir, dst+"2"); err == nil {
		t.Error("a directory was cloned")
	}
	if err := d.Clone(testenv.Context(t), filepath.Join(dir, "none"), dst+"2"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("clone of nothing: %v", err)
	}
}

// Each way to copy gives the same result, whichever this file system takes.
func TestEveryWayToCopy(t *testing.T) {
	ways := map[string]func(ctx context.Context, dst, src *os.File, size int64) error{
		"sparse": copySparse,
		"by hand": func(ctx context.Context, dst, src *os.File, size int64) error {
			return errors.Join(dst.Truncate(size), copyByHand(ctx, dst, src, 0, size))
		},
	}
	for name, way := range ways {
		dir := t.TempDir()
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		const size = 20<<20 + 3
		scatter(t, src, size)
		in, err := os.Open(src)
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(dst)
		if err != nil {
			t.Fatal(err)
		}
		if err := way(testenv.Context(t), out, in, size); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := errors.Join(in.Close(), out.Close()); err != nil {
			t.Error(err)
		}
		if digest(t, src) != digest(t, dst) {
			t.Errorf("%s: the copy differs", name)
		}
	}
}

func TestCloneOfATruncatedSource(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "src")
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	src, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(filepath.Join(dir, "dst"))
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if err := copyRange(testenv.Context(t), dst, src, 0, 16384); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v, want unexpected EOF", err)
	}
	if err := copyByHand(testenv.Context(t), dst, src, 0, 16384); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("by hand: got %v, want unexpected EOF", err)
	}
}

func TestCanceled(t *testing.T) {
	testenv.CheckGoroutines(t)
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	scatter(t, src, 64<<20)
	d := New(Params{BlankDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	cause := errors.New("gone")
	ctx, cancel := context.WithCancelCause(testenv.Context(t))
	cancel(cause)
	if err := d.Create(ctx, dst, 128); !errors.Is(err, cause) {
		t.Errorf("create: %v, want the cause", err)
	}
	// A file system that clones by reflink is done before it looks.
	if err := d.Clone(ctx, src, dst); err != nil {
		if !errors.Is(err, cause) {
			t.Errorf("clone: %v, want the cause", err)
		}
		if _, err := os.Lstat(dst); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left a clone: %v", err)
		}
	}
	d.Close() // the blank image is made to its end
	if names, err := os.ReadDir(d.p.BlankDir); err != nil || len(names) != 1 || strings.HasPrefix(names[0].Name(), tempPrefix) {
		t.Errorf("blank images: %v (%v), want a finished one", names, err)
	}
}

func TestFullDisk(t *testing.T) {
	ctx := testenv.Context(t)
	small := testenv.SmallDisk(t, "64k")
	path := filepath.Join(small, "x")
	if err := disks(t, t.TempDir()).Create(ctx, path, 1024); !fault.Is(err, fault.Exhausted) {
		t.Errorf("no room for the disk: %v, want exhausted", err)
	}
	if err := disks(t, small).Create(ctx, filepath.Join(t.TempDir(), "x"), 1024); !fault.Is(err, fault.Exhausted) {
		t.Errorf("no room for the blank image: %v, want exhausted", err)
	}
	if left, err := os.ReadDir(small); err != nil || len(left) != 0 {
		t.Errorf("left %v (%v)", left, err)
	}
}

func BenchmarkCreate(b *testing.B) {
	d := New(Params{BlankDir: b.TempDir(), Log: slog.New(slog.DiscardHandler)})
	defer d.Close()
	dir := b.TempDir()
	for i := 0; b.Loop(); i++ {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := d.Create(b.Context(), path, 5120); err != nil {
			b.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			b.Fatal(err)
		}
	}
}
