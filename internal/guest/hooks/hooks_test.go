package hooks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/testenv"
)

// image is a directory of hooks, and a file they write their names to.
type image struct {
	Params
	trace string
	log   *bytes.Buffer
}

func newImage(t *testing.T) *image {
	t.Helper()
	testenv.RequireRoot(t)
	testenv.CheckGoroutines(t)
	i := &image{trace: filepath.Join(t.TempDir(), "trace"), log: &bytes.Buffer{}}
	i.Params = Params{
		Dir: filepath.Join(t.TempDir(), "restore.d"), Cgroup: filepath.Join(testenv.Cgroup(t), "restore"),
		Accounts: account.NewFiles("/"), Log: slog.New(slog.NewTextHandler(i.log, nil)),
	}
	if err := os.Mkdir(i.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Rmdir(i.Cgroup); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Errorf("something is left in the hooks' cgroup: %v", err)
		}
	})
	return i
}

// hook makes one that notes its name before it runs body.
func (i *image) hook(t *testing.T, name, body string, mode os.FileMode) {
	t.Helper()
	text := fmt.Sprintf("#!/bin/sh\necho '%s' >>%s\n%s\n", name, i.trace, body)
	path := filepath.Join(i.Dir, name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func (i *image) ran(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(i.trace)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

func (i *image) run(t *testing.T) []string {
	t.Helper()
	warnings, err := Run(testenv.Context(t), i.Params)
	if err != nil {
		t.Error(err)
	}
	return warnings
}

func TestHooksRunInOrder(t *testing.T) {
	i := newImage(t)
	i.hook(t, "20-b", "id -u; echo $HOME; [ -z \"$SECRET\" ]", 0o755)
	i.hook(t, "10-a", "sleep 1000 & exit 0", 0o700) // what it leaves ends with the last hook
	i.hook(t, "30-c", "echo no key >&2; echo half; echo no such key >&2; exit 3", 0o755)
	i.hook(t, "40-d", "kill -9 $$", 0o755)
	i.hook(t, "50-e", "", 0o755)
	i.hook(t, "readme", "", 0o644)
	i.hook(t, ".hidden", "", 0o755)
	i.hook(t, "50-e~", "", 0o755)
	if err := os.Mkdir(filepath.Join(i.Dir, "60-dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(i.Dir, "70-dangling")); err != nil {
		t.Fatal(err)
	}
	warnings := i.run(t)
	if diff := cmp.Diff([]string{"restore hook 30-c: exit code 3: no such key", "restore hook 40-d: killed by killed"}, warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	if got := i.ran(t); got != "10-a 20-b 30-c 40-d 50-e" {
		t.Errorf("ran %q", got)
	}
	if log := i.log.String(); !strings.Contains(log, `20-b output="0\n/root"`) || strings.Contains(log, "50-e") {
		t.Errorf("log:\n%s", log)
	}
}

func TestTimeAndOutputAreBounded(t *testing.T) {
	i := newImage(t)
	i.timeLimit = 500 * time.Millisecond
	i.hook(t, "1", "yes | head -c 1000000; echo; echo end; exit 1", 0o755)
	i.hook(t, "2", "sleep 1000 & sleep 1000", 0o755)
	i.hook(t, "3", "", 0o755)
	want := []string{"restore hook 1: exit code 1: end", "restore hook 2: killed after 500ms"}
	if diff := cmp.Diff(want, i.run(t)); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	if got := i.ran(t); got != "1 2 3" || i.log.Len() > 3*maxOutput {
		t.Errorf("ran %q, log of %d bytes", got, i.log.Len())
	}
}

func TestWhatOthersCouldHaveWrittenIsNotRun(t *testing.T) {
	i := newImage(t)
	i.hook(t, "group", "", 0o775)
	i.hook(t, "mine", "", 0o755)
	i.hook(t, "other", "", 0o755)
	if err := os.Chown(filepath.Join(i.Dir, "other"), 1000, 0); err != nil {
		t.Fatal(err)
	}
	if w := i.run(t); len(w) != 2 || !strings.HasPrefix(w[0], "restore hook group: not run") || !strings.HasPrefix(w[1], "restore hook other: not run") {
		t.Errorf("warnings %q", w)
	}
	if err := os.Chmod(i.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if w := i.run(t); len(w) != 1 {
		t.Errorf("warnings of an open directory: %q", w)
	}
	if got := i.ran(t); got != "mine" {
		t.Errorf("ran %q", got)
	}
}

func TestNoHooksCostNothing(t *testing.T) {
	i := newImage(t)
	for _, dir := range []string{i.Dir, filepath.Join(i.Dir, "none"), "/etc/passwd/none"} {
		i.Dir = dir
		if w := i.run(t); len(w) != 0 {
			t.Errorf("%s: %q", dir, w)
		}
	}
	if _, err := os.Stat(i.Cgroup); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a cgroup was made: %v", err)
	}
}

func TestAHostThatGivesUpEndsTheHook(t *testing.T) {
	i := newImage(t)
	i.hook(t, "1", "sleep 1000", 0o755)
	i.hook(t, "2", "", 0o755)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for i.ran(t) == "" && t.Context().Err() == nil {
		}
		cancel()
	}()
	if _, err := Run(ctx, i.Params); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	if got := i.ran(t); got != "1" {
		t.Errorf("ran %q", got)
	}
}
