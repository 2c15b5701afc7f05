package store

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hutch-run/hutch/internal/sandbox"
)

func TestAMemoryIsUsedOnce(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	const id = sandbox.ID("sb-1")
	check := func(when string, asleep, woken bool) {
		t.Helper()
		if s.Asleep(id) != asleep || s.Woken(id) != woken {
			t.Errorf("%s: asleep %v, woken %v", when, s.Asleep(id), s.Woken(id))
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(s.Dir(id), 0o700))
	must(s.Spend(id))
	must(s.DropMemory(id))
	check("never slept", false, false)
	for range 2 {
		must(os.Mkdir(s.Hibernation(id), 0o700))
		must(os.WriteFile(s.Hibernation(id)+"/memory", []byte("x"), 0o600))
		check("asleep", true, false)
		must(s.Spend(id))
		check("woken", false, true)
		must(s.Spend(id))
		must(s.DropMemory(id))
		check("forgotten", false, false)
	}
	must(os.Mkdir(s.Hibernation(id), 0o700))
	must(s.DropMemory(id))
	check("given up", false, false)
	waitEmpty(t, filepath.Join(root, trashName))
}
