package identity

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sleeper is a guest that was configured and stands still, and its tree.
func sleeper(t *testing.T) (*Identity, string) {
	t.Helper()
	root := tree(t, nil)
	i := newIdentity(root, &machine{})
	if _, err := i.Configure(t.Context(), config()); err != nil {
		t.Fatal(err)
	}
	return i, root
}

func another() Config {
	c := config()
	c.ID, c.MachineID, c.Still = "sb-other", "00112233445566778899aabbccddeeff", true
	return c
}

func TestFilesOfAStillGuestAreWrittenInTheirPlace(t *testing.T) {
	i, root := sleeper(t)
	before := inodes(t, root)
	for _, id := range []string{"sb-a", "sb-a-much-longer-name", "sb-b"} { // longer, and shorter again
		c := another()
		c.ID = id
		facts, err := i.Configure(t.Context(), c)
		if err != nil || len(facts.Warnings) != 0 {
			t.Fatalf("%v, warnings %q", err, facts.Warnings)
		}
		fresh := tree(t, nil)
		if _, err := newIdentity(fresh, &machine{}).Configure(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		want, got := etc(t, fresh), etc(t, root)
		for name, text := range want {
			if got[name] != text {
				t.Errorf("%s: %s is %q, want %q", id, name, got[name], text)
			}
		}
	}
	for name, ino := range inodes(t, root) {
		if before[name] != ino {
			t.Errorf("%s is another file", name)
		}
	}
}

func TestTouchedFilesAreNotWrittenInTheirPlace(t *testing.T) {
	for name, touch := range map[string]func(path string) error{
		"replaced by a link": func(path string) error {
			outside := path + ".outside"
			return firstError(os.WriteFile(outside, []byte("mine\n"), 0o644), os.Remove(path), os.Symlink(outside, path))
		},
		"has another name": func(path string) error { return os.Link(path, path+".outside") },
		"other text":       func(path string) error { return os.WriteFile(path, []byte("mine\n"), 0o644) },
		"other mode":       func(path string) error { return os.Chmod(path, 0o600) },
		"gone":             os.Remove,
	} {
		i, root := sleeper(t)
		path := filepath.Join(root, "etc", "hostname")
		if err := touch(path); err != nil {
			t.Fatal(err)
		}
		kept, _ := os.ReadFile(path + ".outside")
		if _, err := i.Configure(t.Context(), another()); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm() != 0o644 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "sb-other\n" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if now, _ := os.ReadFile(path + ".outside"); string(now) != string(kept) {
			t.Errorf("%s: what is not ours is %q now, was %q", name, now, kept)
		}
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func TestWhatSomebodyElseSaysStays(t *testing.T) {
	root := tree(t, map[string]string{"etc/hosts": "10.0.0.1 mine\n"})
	hosts := filepath.Join(root, "etc", "hosts")
	i := newIdentity(root, &machine{})
	configure := func(c Config, want string) {
		t.Helper()
		if _, err := i.Configure(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(hosts); err != nil || !strings.HasPrefix(string(b), want) {
			t.Errorf("it is %q now, %v", b, err)
		}
	}
	configure(config(), "10.0.0.1 mine\n")
	configure(another(), "10.0.0.1 mine\n")
	if err := os.WriteFile(hosts, []byte(marker+"\nours again\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	configure(another(), marker+"\n127.0.0.1")
	if err := os.Remove(hosts); err != nil {
		t.Fatal(err)
	}
	configure(another(), marker+"\n127.0.0.1")
}
