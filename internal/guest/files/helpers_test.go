package files

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/testenv"
)

// testUID is the account "app" of the tests.
const testUID = 7000

// place is a directory with a store whose users are root and app.
type place struct {
	dir   string
	store *Store
	root  View
	app   View
}

func newPlace(t testing.TB) *place {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		noErr(t, os.Chmod(d, 0o711))
	}
	etc := filepath.Join(dir, "accounts/etc")
	noErr(t, os.MkdirAll(etc, 0o755))
	home := filepath.Join(dir, "home")
	noErr(t, os.Mkdir(home, 0o755))
	noErr(t, os.Chown(home, testUID, testUID))
	noErr(t, os.WriteFile(etc+"/passwd", []byte("root:x:0:0::/root:/bin/sh\napp:x:7000:7000::"+home+":/bin/sh\n"), 0o644))
	noErr(t, os.WriteFile(etc+"/group", []byte("root:x:0:\nappgroup:x:7000:\nteam:x:7001:app\n"), 0o644))
	s, err := New(Params{Log: slog.New(slog.DiscardHandler), Accounts: account.NewFiles(filepath.Join(dir, "accounts")), Defaults: account.Fixed{}})
	noErr(t, err)
	t.Cleanup(func() { noErr(t, s.Close()) })
	p := &place{dir: dir, store: s}
	p.root, err = s.As(account.Choice{})
	noErr(t, err)
	p.app, err = s.As(account.Choice{Field: "app"})
	noErr(t, err)
	return p
}

// path returns a path of the place.
func (p *place) path(elem ...string) string {
	return filepath.Join(append([]string{p.dir}, elem...)...)
}

// put writes a file as root.
func (p *place) put(t testing.TB, name, content string, mode os.FileMode) string {
	t.Helper()
	path := p.path(name)
	noErr(t, os.MkdirAll(filepath.Dir(path), 0o755))
	noErr(t, os.WriteFile(path, []byte(content), 0o600))
	noErr(t, os.Chmod(path, mode))
	return path
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantClass(t testing.TB, what string, err error, class fault.Class) {
	t.Helper()
	if !fault.Is(err, class) {
		t.Errorf("%s: %v, want class %v", what, err, class)
	}
}

func stat(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	noErr(t, unix.Lstat(path, &st))
	return st
}

func content(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	noErr(t, err)
	return string(data)
}

// eventually waits for a condition that nothing announces.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-testenv.Context(t).Done():
			t.Fatalf("never came: %s", what)
		}
	}
}
