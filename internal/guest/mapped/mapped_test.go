package mapped

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// content returns n bytes that differ from page to page.
func content(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func TestRead(t *testing.T) {
	page := uint64(os.Getpagesize())
	want := content(3*int(page) + 100)
	size := uint64(len(want))
	root := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(root, "f"), want, 0o600), os.WriteFile(filepath.Join(root, "empty"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	r := New(root)
	for _, c := range []struct {
		name           string
		offset, length uint64
	}{
		{"all", 0, size}, {"nothing", 0, 0}, {"a byte", 5, 1}, {"a page", page, page},
		{"off the page", page - 3, page + 7}, {"up to the end", 2*page + 50, size},
		{"the last byte", size - 1, 1}, {"beyond the last byte", size - 1, page},
		{"at the end", size, 10}, {"beyond the end", size + 5*page, 10}, {"far beyond", 1 << 63, MaxLength},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := r.Read(context.Background(), "/f", c.offset, c.length)
			from := min(c.offset, size)
			if to := min(from+c.length, size); err != nil || !bytes.Equal(got, want[from:to]) {
				t.Fatalf("%d bytes, %v; want %d", len(got), err, to-from)
			}
		})
	}
	if got, err := r.Read(context.Background(), "/empty", 0, 10); err != nil || len(got) != 0 {
		t.Errorf("an empty file: %d bytes, %v", len(got), err)
	}
}

func TestReadRefuses(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(root, "dir"), 0o700), unix.Mkfifo(filepath.Join(root, "fifo"), 0o600),
		os.WriteFile(filepath.Join(root, "f"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	r := New(root)
	for path, class := range map[string]fault.Class{
		"f": fault.Invalid, "/none": fault.NotFound, "/f/below": fault.NotFound, "/dir": fault.Precondition, "/fifo": fault.Precondition,
	} {
		if b, err := r.Read(context.Background(), path, 0, 1); !fault.Is(err, class) || b != nil {
			t.Errorf("%s: %d bytes, %v; want %v", path, len(b), err, class)
		}
	}
	if _, err := r.Read(context.Background(), "/f", 0, MaxLength+1); !fault.Is(err, fault.Invalid) {
		t.Errorf("more than the cap: %v", err)
	}
}

// A file that is cut between the mapping and the read raises SIGBUS on the pages
// that it lost.
func TestFileIsCutWhileMapped(t *testing.T) {
	page := os.Getpagesize()
	want := content(4 * page)
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, offset := range []int{0, page + 10} {
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := mapFile(f, uint64(offset), uint64(4*page))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, int64(2*page)); err != nil {
			t.Fatal(err)
		}
		got := m.copy()
		if err := m.close(); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got, want[offset:2*page]) {
			t.Errorf("from %d: %d bytes; want %d", offset, len(got), 2*page-offset)
		}
	}
}
