package files

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

func TestStat(t *testing.T) {
	p := newPlace(t)
	file := p.put(t, "d/file", "hello", 0o640)
	noErr(t, os.Chown(file, testUID, 7001))
	noErr(t, os.Symlink("file", p.path("d/link")))
	noErr(t, os.Symlink("nowhere", p.path("d/broken")))
	noErr(t, unix.Mkfifo(p.path("d/fifo"), 0o600))
	noErr(t, os.Chmod(p.path("d"), 0o755|os.ModeSetgid|os.ModeSticky))
	for name, want := range map[string]Entry{
		"d/file":   {Name: "file", Type: File, Path: file, Size: 5, Mode: 0o640, Permissions: "-rw-r-----", Owner: "app", Group: "team"},
		"d":        {Name: "d", Type: Directory, Path: p.path("d"), Mode: 0o3755, Permissions: "drwxr-sr-t", Owner: "root", Group: "root"},
		"d/link":   {Name: "link", Type: File, Path: p.path("d/link"), Size: 4, Mode: 0o777, Permissions: "lrwxrwxrwx", Owner: "root", Group: "root", Target: file},
		"d/broken": {Name: "broken", Type: Symlink, Path: p.path("d/broken"), Size: 7, Mode: 0o777, Permissions: "lrwxrwxrwx", Owner: "root", Group: "root", Target: "nowhere"},
		"d/fifo":   {Name: "fifo", Type: Other, Path: p.path("d/fifo"), Mode: 0o600, Permissions: "prw-------", Owner: "root", Group: "root"},
	} {
		got, err := p.root.Stat(p.path(name))
		noErr(t, err)
		if got.Modified.IsZero() {
			t.Errorf("%s: no time", name)
		}
		got.Modified = want.Modified
		if want.Type == Directory {
			got.Size = 0
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	_, err := p.root.Stat(p.path("none"))
	wantClass(t, "missing", err, fault.NotFound)
	_, err = p.root.Stat(file + "/x")
	wantClass(t, "below a file", err, fault.Invalid)
	_, err = p.root.Stat("a\x00b")
	wantClass(t, "NUL", err, fault.Invalid)
	_, err = p.root.Stat("/" + strings.Repeat("x/", 4000))
	wantClass(t, "too long", err, fault.Invalid)
	home, err := p.app.Stat("~")
	if err != nil || home.Path != p.path("home") {
		t.Errorf("home: %+v, %v", home, err)
	}
}

func TestList(t *testing.T) {
	p := newPlace(t)
	for _, f := range []string{"t/b/2", "t/b/c/3", "t/a", "t/z"} {
		p.put(t, f, "", 0o644)
	}
	noErr(t, os.Symlink("b", p.path("t/link")))
	noErr(t, os.Mkdir(p.path("t/secret"), 0o700))
	p.put(t, "t/secret/inner", "", 0o644)
	names := func(v View, depth int) []string {
		t.Helper()
		es, err := v.List(p.path("t"), depth)
		noErr(t, err)
		var ns []string
		for _, e := range es {
			rel, _ := filepath.Rel(p.path("t"), e.Path)
			ns = append(ns, rel)
		}
		return ns
	}
	one := []string{"a", "b", "link", "secret", "z"}
	two := []string{"a", "b", "b/2", "b/c", "link", "secret", "z"}
	all := []string{"a", "b", "b/2", "b/c", "b/c/3", "link", "secret", "secret/inner", "z"}
	for _, tc := range []struct {
		view  View
		depth int
		want  []string
	}{{p.root, 0, one}, {p.root, 1, one}, {p.app, 2, two}, {p.root, 99, all}} {
		if d := cmp.Diff(tc.want, names(tc.view, tc.depth)); d != "" {
			t.Errorf("depth %d: %s", tc.depth, d)
		}
	}
	_, err := p.root.List(p.path("t/a"), 1)
	wantClass(t, "a file", err, fault.Invalid)
	_, err = p.app.List(p.path("t/secret"), 1)
	wantClass(t, "unreadable", err, fault.Denied)
	p.store.params.MaxEntries = 3
	_, err = p.root.List(p.path("t"), 1)
	wantClass(t, "too many", err, fault.Exhausted)
}

func TestMakeDir(t *testing.T) {
	p := newPlace(t)
	e, err := p.app.MakeDir("a/b/c")
	if err != nil || e.Path != p.path("home/a/b/c") || e.Type != Directory || e.Owner != "app" {
		t.Errorf("%+v, %v", e, err)
	}
	if st := stat(t, p.path("home/a")); st.Uid != testUID {
		t.Errorf("the parent belongs to %d", st.Uid)
	}
	_, err = p.app.MakeDir("a/b/c/")
	wantClass(t, "again", err, fault.Exists)
	file := p.put(t, "file", "", 0o644)
	_, err = p.root.MakeDir(file)
	wantClass(t, "over a file", err, fault.Invalid)
	_, err = p.app.MakeDir(p.path("not-mine/x"))
	wantClass(t, "in root's", err, fault.Denied)
	_, err = p.app.MakeDir("")
	wantClass(t, "empty", err, fault.Invalid)
}

func TestMove(t *testing.T) {
	p := newPlace(t)
	src := p.put(t, "a/src", "x", 0o644)
	p.put(t, "b/old", "y", 0o644)
	e, err := p.root.Move(src, p.path("new/place/dst"))
	if err != nil || e.Path != p.path("new/place/dst") || content(t, e.Path) != "x" {
		t.Errorf("%+v, %v", e, err)
	}
	_, err = p.root.Move(e.Path, p.path("b/old"))
	noErr(t, err)
	if content(t, p.path("b/old")) != "x" {
		t.Error("the old file is not replaced")
	}
	_, err = p.root.Move(p.path("none"), p.path("made/x"))
	wantClass(t, "missing source", err, fault.NotFound)
	if _, err := os.Stat(p.path("made")); err == nil {
		t.Error("a failed move made directories")
	}
	_, err = p.root.Move(p.path("b"), p.path("b/inside"))
	wantClass(t, "into itself", err, fault.Invalid)
	_, err = p.app.Move(p.path("b/old"), p.path("home/mine"))
	wantClass(t, "root's file by app", err, fault.Denied)
	p.put(t, "full/x", "", 0o644)
	_, err = p.root.Move(p.path("b"), p.path("full"))
	wantClass(t, "onto a full directory", err, fault.Exists)
	_, err = p.root.Move(p.path("b/old"), "/dev/shm/hutch-files-test")
	if err == nil {
		_ = os.Remove("/dev/shm/hutch-files-test")
		t.Skip("/dev/shm is not a filesystem of its own here")
	}
	wantClass(t, "to another filesystem", err, fault.Precondition)
}

func TestRemove(t *testing.T) {
	p := newPlace(t)
	for i := range 600 {
		p.put(t, fmt.Sprintf("d/%d/%d/f", i%3, i), "x", 0o644)
	}
	keep := p.put(t, "keep/file", "kept", 0o644)
	noErr(t, os.Symlink(p.path("keep"), p.path("d/link")))
	wantClass(t, "not app's", p.app.Remove(p.path("d")), fault.Denied)
	noErr(t, p.root.Remove(p.path("d")))
	if _, err := os.Lstat(p.path("d")); err == nil {
		t.Error("still there")
	}
	if content(t, keep) != "kept" {
		t.Error("a link was followed")
	}
	noErr(t, p.root.Remove(p.path("d")))
	noErr(t, p.root.Remove(keep))
	for _, path := range []string{"", "/", "//", "/..", "/x/.."} {
		wantClass(t, path, p.root.Remove(path), fault.Invalid)
	}
}

func TestRemoveDoesNotCrossMounts(t *testing.T) {
	p := newPlace(t)
	inner := p.put(t, "other/data", "precious", 0o644)
	noErr(t, os.MkdirAll(p.path("d/sub/mnt"), 0o755))
	// A bind mount has the same device number as what surrounds it.
	if err := unix.Mount(p.path("other"), p.path("d/sub/mnt"), "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("bind mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(p.path("d/sub/mnt"), unix.MNT_DETACH) })
	for _, path := range []string{"d", "d/sub/mnt"} {
		err := p.root.Remove(p.path(path))
		wantClass(t, path, err, fault.Precondition)
		if err != nil && !strings.Contains(err.Error(), p.path("d/sub/mnt")) {
			t.Errorf("%v does not name the mount point", err)
		}
	}
	if content(t, inner) != "precious" {
		t.Error("deleted through a mount")
	}
}

// swap exchanges a directory and a link to another one as fast as it can.
func swap(t *testing.T, a, b string) (stop func()) {
	t.Helper()
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !done.Load() {
			_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
		}
	})
	return func() {
		done.Store(true)
		wg.Wait()
	}
}

func TestRemoveWhileLinksAreSwapped(t *testing.T) {
	p := newPlace(t)
	victim := p.put(t, "victim/file", "precious", 0o644)
	for range 30 {
		noErr(t, os.MkdirAll(p.path("t/x/deep"), 0o755))
		for i := range 20 {
			p.put(t, fmt.Sprintf("t/x/deep/%d", i), "", 0o644)
		}
		p.put(t, "t/x/file", "", 0o644)
		noErr(t, os.Symlink(p.path("victim"), p.path("t/link")))
		stop := swap(t, p.path("t/x"), p.path("t/link"))
		_ = p.root.Remove(p.path("t/x"))
		_ = p.root.Remove(p.path("t"))
		stop()
		if content(t, victim) != "precious" {
			t.Fatal("deleted through a link")
		}
		noErr(t, os.RemoveAll(p.path("t")))
	}
}
