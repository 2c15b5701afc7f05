package files

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func watch(t testing.TB, v View, spec WatchSpec) *Watch {
	t.Helper()
	w, err := v.Watch(spec)
	noErr(t, err)
	t.Cleanup(w.Close)
	return w
}

var kindNames = map[ChangeKind]string{Created: "create", Written: "write", Removed: "remove", Renamed: "rename", Chmodded: "chmod"}

func show(c Change) string { return kindNames[c.Kind] + " " + c.Name }

// until takes changes up to the one wanted.
func until(t testing.TB, w *Watch, last string) []string {
	t.Helper()
	var seen []string
	for {
		c, ok, err := w.Next(testenv.Context(t), 0)
		if err != nil || !ok {
			t.Fatalf("waiting for %q: %v; seen %q", last, err, seen)
		}
		seen = append(seen, show(c))
		if show(c) == last {
			return seen
		}
	}
}

func TestWatchTellsWhatHappens(t *testing.T) {
	p := newPlace(t)
	d := p.path("w")
	noErr(t, os.Mkdir(d, 0o755))
	w := watch(t, p.root, WatchSpec{Path: d})
	noErr(t, os.WriteFile(d+"/a", []byte("x"), 0o644))
	noErr(t, os.Chmod(d+"/a", 0o600))
	noErr(t, os.Rename(d+"/a", d+"/b"))
	noErr(t, os.Remove(d+"/b"))
	noErr(t, os.Mkdir(d+"/sub", 0o755))
	noErr(t, os.WriteFile(d+"/sub/unseen", nil, 0o644))
	noErr(t, os.Remove(d+"/sub/unseen"))
	noErr(t, os.Remove(d+"/sub"))
	want := []string{"create a", "write a", "chmod a", "rename a", "create b", "remove b", "create sub", "remove sub"}
	if diff := cmp.Diff(want, until(t, w, "remove sub")); diff != "" {
		t.Error(diff)
	}
	// An upload shows once, whole.
	_, err := upload(t, p.root, d+"/up", "content", CreateOptions{})
	noErr(t, err)
	if diff := cmp.Diff([]string{"create up", "write up"}, until(t, w, "write up")); diff != "" {
		t.Error(diff)
	}
	noErr(t, os.RemoveAll(d))
	if diff := cmp.Diff([]string{"remove up", "remove ."}, until(t, w, "remove .")); diff != "" {
		t.Error(diff)
	}
	_, _, err = w.Next(testenv.Context(t), 0)
	wantClass(t, "after the end of the directory", err, fault.NotFound)
}

// Trees that come up as fast as they can: every file is told at least once,
// whatever the watch saw of its directory's birth.
func TestWatchRecursiveMissesNothing(t *testing.T) {
	p := newPlace(t)
	d := p.path("w")
	noErr(t, os.MkdirAll(d+"/old/er", 0o755))
	w := watch(t, p.root, WatchSpec{Path: d, Recursive: true})
	want := map[string]bool{}
	for i := range 100 {
		sub := fmt.Sprintf("n%d/a/b", i)
		noErr(t, os.MkdirAll(filepath.Join(d, sub), 0o755))
		for j := range 3 {
			f := fmt.Sprintf("%s/f%d", sub, j)
			noErr(t, os.WriteFile(filepath.Join(d, f), nil, 0o644))
			want["create "+f] = true
		}
		want["create n"+fmt.Sprint(i)], want["create "+sub] = true, true
	}
	noErr(t, os.WriteFile(d+"/old/er/x", nil, 0o644))
	want["create old/er/x"] = true
	noErr(t, os.WriteFile(d+"/last", nil, 0o644))
	counts := map[string]int{}
	for _, s := range until(t, w, "create last") {
		counts[s]++
	}
	for s := range want {
		if counts[s] != 1 {
			t.Errorf("%q was told %d times", s, counts[s])
		}
	}
}

func TestWatchFollowsMovedDirectories(t *testing.T) {
	p := newPlace(t)
	d := p.path("w")
	noErr(t, os.MkdirAll(d+"/a/sub", 0o755))
	noErr(t, os.MkdirAll(p.path("outside/in"), 0o755))
	w := watch(t, p.root, WatchSpec{Path: d, Recursive: true})
	noErr(t, os.Rename(d+"/a", d+"/b"))
	until(t, w, "create b")
	noErr(t, os.WriteFile(d+"/b/sub/f", nil, 0o644))
	until(t, w, "create b/sub/f")
	// Out of the tree: nothing more from there.
	noErr(t, os.Rename(d+"/b", p.path("outside/b")))
	until(t, w, "rename b")
	noErr(t, os.WriteFile(p.path("outside/b/sub/g"), nil, 0o644))
	noErr(t, os.WriteFile(d+"/mark", nil, 0o644))
	if seen := until(t, w, "create mark"); len(seen) != 1 {
		t.Errorf("seen from outside: %q", seen)
	}
	// Into the tree: what is in it is told, and watched.
	noErr(t, os.Rename(p.path("outside/b"), d+"/c"))
	until(t, w, "create c/sub/g")
	noErr(t, os.WriteFile(d+"/c/sub/h", nil, 0o644))
	until(t, w, "create c/sub/h")
}

func TestWatchEntriesIdleAndContext(t *testing.T) {
	p := newPlace(t)
	w := watch(t, p.app, WatchSpec{Path: "~", Entries: true})
	if _, ok, err := w.Next(testenv.Context(t), time.Millisecond); ok || err != nil {
		t.Errorf("idle: %v %v", ok, err)
	}
	_, err := upload(t, p.app, "f", "12345", CreateOptions{})
	noErr(t, err)
	c, ok, err := w.Next(testenv.Context(t), 0)
	if err != nil || !ok || c.Entry == nil || c.Entry.Size != 5 || c.Entry.Path != p.path("home/f") {
		t.Errorf("%+v, %v", c, err)
	}
	until(t, w, "write f")
	ctx, cancel := context.WithCancel(testenv.Context(t))
	time.AfterFunc(5*time.Millisecond, cancel)
	if _, _, err := w.Next(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	time.AfterFunc(5*time.Millisecond, w.Close)
	_, _, err = w.Next(testenv.Context(t), 0)
	wantClass(t, "closed", err, fault.Canceled)
}

func TestWatchRefusals(t *testing.T) {
	p := newPlace(t)
	f := p.put(t, "file", "", 0o644)
	noErr(t, os.Mkdir(p.path("secret"), 0o700))
	for path, class := range map[string]fault.Class{f: fault.Invalid, p.path("none"): fault.NotFound, p.path("secret"): fault.Denied} {
		_, err := p.app.Watch(WatchSpec{Path: path})
		wantClass(t, path, err, class)
	}
}

func TestWatchOverflowIsAnError(t *testing.T) {
	p := newPlace(t)
	d := p.path("w")
	noErr(t, os.Mkdir(d, 0o755))
	w := watch(t, p.root, WatchSpec{Path: d})
	limit := 0
	_, err := fmt.Sscan(content(t, "/proc/sys/fs/inotify/max_queued_events"), &limit)
	noErr(t, err)
	for i := range limit/2 + 100 {
		name := d + "/" + fmt.Sprint(i%2)
		noErr(t, unix.Mknod(name, unix.S_IFREG|0o600, 0))
		noErr(t, os.Remove(name))
	}
	for {
		_, _, err = w.Next(testenv.Context(t), 0)
		if err != nil {
			break
		}
	}
	wantClass(t, "overflow", err, fault.Exhausted)
}

func TestPolledWatchers(t *testing.T) {
	p := newPlace(t)
	id, err := p.app.CreateWatcher(WatchSpec{Path: "~", Recursive: true})
	noErr(t, err)
	noErr(t, os.Mkdir(p.path("home/d"), 0o755))
	noErr(t, os.WriteFile(p.path("home/d/f"), nil, 0o644))
	var seen []string
	eventually(t, "the file", func() bool {
		changes, err := p.app.WatcherEvents(id)
		noErr(t, err)
		for _, c := range changes {
			seen = append(seen, show(c))
		}
		return slices.Contains(seen, "create d/f")
	})
	if diff := cmp.Diff([]string{"create d", "create d/f"}, seen); diff != "" {
		t.Error(diff)
	}
	other, err := p.root.CreateWatcher(WatchSpec{Path: p.path("home")})
	noErr(t, err)
	_, err = p.app.WatcherEvents(other)
	wantClass(t, "somebody else's", err, fault.NotFound)
	noErr(t, p.root.RemoveWatcher(id))
	_, err = p.app.WatcherEvents(id)
	wantClass(t, "removed", err, fault.NotFound)
	_, err = p.app.CreateWatcher(WatchSpec{Path: "none"})
	wantClass(t, "nothing to watch", err, fault.NotFound)
	for i := 1; i < maxPollers; i++ {
		_, err := p.app.CreateWatcher(WatchSpec{Path: "~"})
		noErr(t, err)
	}
	_, err = p.app.CreateWatcher(WatchSpec{Path: "~"})
	wantClass(t, "one too many", err, fault.Exhausted)
	p.store.expirePollers(time.Now().Add(2 * pollerExpiry))
	_, err = p.app.CreateWatcher(WatchSpec{Path: "~"})
	noErr(t, err)
}
