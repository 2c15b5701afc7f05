package account

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func tree(t *testing.T, passwd, group string) *Files {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"passwd": passwd, "group": group} {
		if text == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return NewFiles(root)
}

const passwd = `# a comment
root:x:0:0:root:/root:/bin/bash
+nis::::::
app:x:1000:1001:App:/home/app:
1000:x:7:7::/seven:/bin/seven
twin:x:1000:1:::
bad:x:minus:0::/:/bin/sh
big:x:4294967295:0::/:/bin/sh
short:x:1
`

const group = `root:x:0:
app:x:1001:app
docker:x:999:other, app
again:x:999:app
wheel:x:10:apple,app2
broken:x:nan:app
`

func TestLookup(t *testing.T) {
	f := tree(t, passwd+strings.Repeat("x", 3*maxLineBytes)+"\nlast:x:9:9::/last:/bin/last\n", group)
	app := User{Name: "app", UID: 1000, GID: 1001, Groups: []uint32{999}, Home: "/home/app", Shell: "/bin/sh"}
	withGroup := app
	withGroup.GID, withGroup.Groups = 10, nil
	for spec, want := range map[string]User{
		"root":      {Name: "root", Home: "/root", Shell: "/bin/bash"},
		"0":         {Name: "root", Home: "/root", Shell: "/bin/bash"},
		"app":       app,
		"1000":      {Name: "1000", UID: 7, GID: 7, Home: "/seven", Shell: "/bin/seven"}, // a name goes first
		"app:wheel": withGroup,
		"app:10":    withGroup,
		"77:88":     {UID: 77, GID: 88, Home: "/", Shell: "/bin/sh"},
		"77":        {UID: 77, Home: "/", Shell: "/bin/sh"},
		"last":      {Name: "last", UID: 9, GID: 9, Home: "/last", Shell: "/bin/last"},
	} {
		got, err := f.Lookup(spec)
		if err != nil {
			t.Errorf("%s: %v", spec, err)
		} else if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", spec, d)
		}
	}
	for _, spec := range []string{"", ":", "app:", "nobody", "bad", "big", "short", "4294967295", "-1", "app:nogroup", strings.Repeat("9", 300)} {
		if u, err := f.Lookup(spec); err == nil {
			t.Errorf("%q: found %+v", spec, u)
		}
	}
}

func TestLookupWithoutFiles(t *testing.T) {
	f := NewFiles(t.TempDir())
	u, err := f.Lookup("root")
	if d := cmp.Diff(User{Name: "root", Home: "/root", Shell: "/bin/sh"}, u); err != nil || d != "" {
		t.Errorf("root: %v %s", err, d)
	}
	var unknown *UnknownUserError
	if _, err := f.Lookup("app"); !errors.As(err, &unknown) {
		t.Errorf("app: %v", err)
	}
}

// The guest may put anything there; nothing may hang.
func TestHostileFiles(t *testing.T) {
	f := tree(t, "", group)
	if err := unix.Mkfifo(filepath.Join(f.root, "etc/passwd"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Lookup("root"); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a fifo: %v", err)
	}
	if got := f.Names().User(0); got != "0" {
		t.Errorf("name of 0 is %q", got)
	}
}

func TestNames(t *testing.T) {
	n := tree(t, passwd, group).Names()
	got := []string{n.User(0), n.User(1000), n.User(5), n.Group(999), n.Group(6)}
	if d := cmp.Diff([]string{"root", "app", "5", "docker", "6"}, got); d != "" {
		t.Error(d)
	}
}

func TestChoose(t *testing.T) {
	f := tree(t, passwd, group)
	for name, tc := range map[string]struct {
		choice Choice
		def    string
		want   string
		class  fault.Class
	}{
		"field first":     {choice: Choice{"app", "root"}, def: "root", want: "app"},
		"then header":     {choice: Choice{"", "app"}, def: "root", want: "app"},
		"then default":    {def: "app", want: "app"},
		"then root":       {want: "root"},
		"unknown field":   {choice: Choice{"no", "app"}, class: fault.Invalid},
		"unknown header":  {choice: Choice{"", "no"}, class: fault.Unauthenticated},
		"unknown default": {def: "no", class: fault.Precondition},
	} {
		u, err := f.Choose(tc.choice, Fixed{UserName: tc.def})
		if tc.want == "" {
			if !fault.Is(err, tc.class) {
				t.Errorf("%s: %v", name, err)
			}
		} else if err != nil || u.Name != tc.want {
			t.Errorf("%s: %+v %v", name, u, err)
		}
	}
}

func TestHeaderUser(t *testing.T) {
	r := http.Request{Header: http.Header{}}
	if got := HeaderUser(r.Header); got != "" {
		t.Errorf("no header: %q", got)
	}
	r.SetBasicAuth("app", "")
	if got := HeaderUser(r.Header); got != "app" {
		t.Errorf("got %q", got)
	}
	r.Header.Set("Authorization", "Bearer x")
	if got := HeaderUser(r.Header); got != "" {
		t.Errorf("bearer: %q", got)
	}
}

func TestExpandPath(t *testing.T) {
	u := User{Home: "/home/app"}
	for _, tc := range [][3]string{
		{"~", "", "/home/app"}, {"~/x", "/b", "/home/app/x"}, {"x/y", "", "/home/app/x/y"}, {"x", "/b", "/b/x"},
		{"/x", "/b", "/x"}, {"~other", "", "/home/app/~other"}, {"", "", "/home/app"},
	} {
		if got := u.ExpandPath(tc[0], tc[1]); got != tc[2] {
			t.Errorf("%q from %q: %q, want %q", tc[0], tc[1], got, tc[2])
		}
	}
}

// The kernel's own checks, in parallel with root's, so that a leak of one
// thread's identity to another would show.
func TestDo(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(dir, "secret")
	shared := filepath.Join(dir, "shared")
	for path, mode := range map[string]os.FileMode{secret: 0o600, shared: 0o640} {
		if err := os.WriteFile(path, []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(shared, 0, 7001); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	member := User{UID: 7000, GID: 7000, Groups: []uint32{7001}}
	stranger := User{UID: 7002, GID: 7002}
	read := func(path string) func() error {
		return func() error { _, err := os.ReadFile(path); return err }
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				for _, c := range []struct {
					user User
					path string
					ok   bool
				}{
					{User{}, secret, true}, {member, secret, false}, {stranger, secret, false},
					{member, shared, true}, {stranger, shared, false}, {stranger, "/proc/1/environ", false},
				} {
					if err := c.user.Do(read(c.path)); (err == nil) != c.ok || (err != nil && !errors.Is(err, fs.ErrPermission)) {
						t.Errorf("user %s reads %s: %v", c.user.Label(), c.path, err)
					}
				}
				if _, err := os.ReadFile(secret); err != nil {
					t.Errorf("root itself: %v", err)
				}
			}
		})
	}
	wg.Wait()
	made := filepath.Join(open, "made")
	if err := member.Do(func() error { return os.WriteFile(made, nil, 0o600) }); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(made, &st); err != nil || st.Uid != 7000 || st.Gid != 7000 {
		t.Errorf("owner %d:%d, %v", st.Uid, st.Gid, err)
	}
}

func TestDoPassesPanicsOn(t *testing.T) {
	testenv.RequireRoot(t)
	defer func() {
		if p := recover(); p != "boom" {
			t.Errorf("recovered %v", p)
		}
		if uid, _ := unix.SetfsuidRetUid(-1); uid != 0 {
			t.Errorf("file user %d stayed", uid)
		}
	}()
	_ = User{UID: 7000}.Do(func() error { panic("boom") })
}
