package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/guest/identity"
)

// TestDefaultsOutliveTheServer writes what one server was told and reads it as
// the next one does.
func TestDefaultsOutliveTheServer(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hutch/defaults")
	log := slog.New(slog.DiscardHandler)
	next := func() *keptIdentity { return keepIdentity(&identity.Identity{}, file, log) }
	if k := next(); k.before() != nil {
		t.Errorf("a first server knows %+v", k.before())
	}
	want := defaults{"user", "/srv", map[string]string{"A": "1=2", "B": ""}, true}
	if err := writeDefaults(file, want); err != nil {
		t.Fatal(err)
	}
	k := next()
	if cmp.Diff(want.env, k.Env()) != "" || k.User() != want.user || k.Cwd() != want.cwd || !k.TestFeatures() {
		t.Errorf("the next server says %v %q %q %v", k.Env(), k.User(), k.Cwd(), k.TestFeatures())
	}
	for name, content := range map[string]string{"garbage": "{", "newer": "hutch-defaults-3\x00user\x00/\x00", "cut": "hutch-defaults-2\x00user\x00/sr"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if k := next(); k.before() != nil {
			t.Errorf("%s was believed: %+v", name, k.before())
		}
	}
	if fi, err := os.Stat(filepath.Dir(file)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory %v, %v", fi, err)
	}
}
