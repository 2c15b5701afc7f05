package modules

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"modules.dep":     "kernel/a-b.ko: kernel/c.ko kernel/d.ko\nkernel/c.ko: kernel/d.ko\nkernel/d.ko:\nkernel/z.ko.xz: kernel/d.ko\n",
		"modules.builtin": "kernel/in-side.ko\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestWhatIsNeededComesFirst(t *testing.T) {
	dir := tree(t)
	var got []string
	err := load(dir, []string{"a_b", "in_side", "c", "z"}, func(f string) error {
		rel, err := filepath.Rel(dir, f)
		got = append(got, rel)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	want := []string{"kernel/d.ko", "kernel/c.ko", "kernel/a-b.ko", "kernel/z.ko.xz"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("loaded (-want +got):\n%s", diff)
	}
}

func TestOneThatCannotBeLoadedKeepsNoOther(t *testing.T) {
	dir := tree(t)
	var got []string
	err := load(dir, []string{"none", "c", "z"}, func(f string) error {
		if filepath.Base(f) == "c.ko" {
			return unix.EPERM
		}
		got = append(got, filepath.Base(f))
		return nil
	})
	if !errors.Is(err, errUnknown) || !errors.Is(err, unix.EPERM) {
		t.Errorf("error = %v", err)
	}
	if diff := cmp.Diff([]string{"d.ko", "z.ko.xz"}, got); diff != "" {
		t.Errorf("loaded (-want +got):\n%s", diff)
	}
	if err := load(t.TempDir(), []string{"c"}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without an index: %v", err)
	}
}
