package kubeconfig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
)

const guest = `apiVersion: v1
kind: Config
clusters:
- {name: hutch, cluster: {server: "https://127.0.0.1:6443", certificate-authority-data: %s}}
users:
- {name: hutch, user: {client-certificate-data: Y2VydA==, client-key-data: a2V5}}
contexts:
- {name: hutch, context: {cluster: hutch, user: hutch}}
current-context: hutch
`

// theirs is what a user has, with what no writer but ours keeps.
const theirs = `# work
apiVersion: v1
kind: Config
preferences: {}
current-context: prod # never change this
clusters:
# the one that earns the money
- name: prod
  cluster:
    server: https://prod.example # behind the VPN
    extra-field: 7
users:
- name: prod
  user:
    token: secret
contexts:
- name: prod
  context: {cluster: prod, user: prod, namespace: shop}
`

func entries(t *testing.T, id, ca string) Entries {
	t.Helper()
	e, err := New(fmt.Appendf(nil, guest, ca), "hutch", "hutch-"+id, "https://127.0.0.1:40001", "")
	if err != nil {
		t.Fatal(err)
	}
	return e
}

const (
	caOne = "b25l"
	caTwo = "dHdv"
)

func write(t *testing.T, file, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, mode); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func mergeInto(t *testing.T, file string, e Entries, use bool) {
	t.Helper()
	got, err := Merge(t.Context(), []string{file}, e, use)
	if err != nil || got != file {
		t.Fatalf("merged into %s, %v", got, err)
	}
}

func TestMergeKeepsTheirs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	write(t, file, theirs, 0o640)
	mergeInto(t, file, entries(t, "a", caOne), false)
	text := readFile(t, file)
	for line := range strings.Lines(theirs) {
		if !strings.Contains(text, line) {
			t.Errorf("this line is lost: %q in\n%s", line, text)
		}
	}
	c, err := clientcmd.LoadFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	own := c.Clusters["hutch-a"]
	if own == nil || string(own.CertificateAuthorityData) != "one" || own.Server != "https://127.0.0.1:40001" || c.CurrentContext != "prod" {
		t.Errorf("merged: %+v, current %s", own, c.CurrentContext)
	}
	if x := c.Contexts["hutch-a"]; x == nil || x.Cluster != "hutch-a" || x.AuthInfo != "hutch-a" || c.AuthInfos["hutch-a"] == nil {
		t.Errorf("context %+v", x)
	}
	if fi, _ := os.Stat(file); fi.Mode().Perm() != 0o640 {
		t.Errorf("mode %v", fi.Mode())
	}

	mergeInto(t, file, entries(t, "a", caTwo), true)
	c, err = clientcmd.LoadFromFile(file)
	if err != nil || string(c.Clusters["hutch-a"].CertificateAuthorityData) != "two" || len(c.Clusters) != 2 || c.CurrentContext != "hutch-a" {
		t.Errorf("the stale certificate stays, or the context: %v\n%s", err, readFile(t, file))
	}
	if !strings.Contains(readFile(t, file), "# never change this") || strings.Count(readFile(t, file), "name: hutch-a") != 3 {
		t.Errorf("after the second merge:\n%s", readFile(t, file))
	}

	changed, err := Remove(t.Context(), []string{file, filepath.Join(t.TempDir(), "none")}, "hutch-a")
	if err != nil || !cmp.Equal(changed, []string{file}) {
		t.Fatalf("removed from %v, %v", changed, err)
	}
	want := strings.Replace(theirs, "current-context: prod", `current-context: ""`, 1)
	if d := cmp.Diff(want, readFile(t, file)); d != "" {
		t.Errorf("after the removal: %s", d)
	}
}

// TestMergeFormats merges into whatever kubectl reads.
func TestMergeFormats(t *testing.T) {
	for name, text := range map[string]string{
		"none": "", "empty": "\n", "comment": "# mine\n", "null": "null\n", "no lists": "apiVersion: v1\nkind: Config\n",
		"null lists": "clusters: null\nusers:\ncontexts: []\n", "indented": "clusters:\n  - name: x\n    cluster: {server: https://x}\n",
		"json":    `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"x","cluster":{"server":"https://x"}}],"users":[],"contexts":null}`,
		"anchors": "clusters:\n- name: x\n  cluster: &c {server: https://x}\n- name: z\n  cluster: *c\n",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "new", "config")
			if name != "none" {
				write(t, file, text, 0o600)
			}
			mergeInto(t, file, entries(t, "a", caOne), false)
			c, err := clientcmd.LoadFromFile(file)
			if err != nil {
				t.Fatalf("%v\n%s", err, readFile(t, file))
			}
			if own := c.Clusters["hutch-a"]; own == nil || own.Server != "https://127.0.0.1:40001" || c.CurrentContext != "" {
				t.Errorf("current %q in\n%s", c.CurrentContext, readFile(t, file))
			}
			for name, cluster := range c.Clusters {
				if name != "hutch-a" && cluster.Server != "https://x" {
					t.Errorf("cluster %s: %s", name, cluster.Server)
				}
			}
			if fi, _ := os.Stat(file); fi.Mode().Perm() != 0o600 {
				t.Errorf("mode %v", fi.Mode())
			}
		})
	}
}

func TestBadFilesStay(t *testing.T) {
	for name, text := range map[string]string{
		"garbage": "\tnot: [yaml", "list": "- a\n", "other kind": "apiVersion: v9\nkind: Secret\n",
		"two documents": theirs + "---\n" + theirs, "clusters": "clusters: {a: b}\n",
		"twice": "clusters:\n- name: hutch-a\n  cluster: {server: https://x}\n- name: hutch-a\n  cluster: {server: https://y}\n",
	} {
		file := filepath.Join(t.TempDir(), "config")
		write(t, file, text, 0o600)
		if _, err := Merge(t.Context(), []string{file}, entries(t, "a", caOne), true); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: error %v does not name the file", name, err)
		}
		if readFile(t, file) != text {
			t.Errorf("%s was changed to\n%s", name, readFile(t, file))
		}
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ro"), theirs, 0o400)
	for name, want := range map[string]string{"ro": "read-only", ".": "regular"} {
		if _, err := Merge(t.Context(), []string{filepath.Join(dir, name)}, entries(t, "a", caOne), false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := readFile(t, filepath.Join(dir, "ro")); got != theirs {
		t.Errorf("the read-only file was changed to\n%s", got)
	}
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("left behind: %v", list)
	}
}

func TestSymlinksStay(t *testing.T) {
	dir := t.TempDir()
	real := filepath.Join(dir, "dotfiles", "kube")
	link := filepath.Join(dir, "home", "config")
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../dotfiles/kube", link); err != nil {
		t.Fatal(err)
	}
	for _, there := range []bool{false, true} {
		if there {
			write(t, real, theirs, 0o644)
		}
		mergeInto(t, link, entries(t, "a", caOne), false)
		if to, err := os.Readlink(link); err != nil || to != "../dotfiles/kube" {
			t.Errorf("the symlink leads to %q, %v", to, err)
		}
		if fi, err := os.Lstat(real); err != nil || !fi.Mode().IsRegular() || there != (fi.Mode().Perm() == 0o644) {
			t.Errorf("the file: %v, %v", fi, err)
		}
	}
}

func TestFilesAsKubectl(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	env := map[string]string{"KUBECONFIG": a + "::" + b + ":" + a, "HOME": dir}
	getenv := func(k string) string { return env[k] }
	files, err := Files(getenv)
	if err != nil || !cmp.Equal(files, []string{a, b}) {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, want := range []string{b, b, a} { // none is there: the last; then the first that is
		if want == a {
			write(t, a, theirs, 0o600)
		}
		if got, err := Merge(t.Context(), files, entries(t, "a", caOne), false); err != nil || got != want {
			t.Errorf("merged into %s, %v; want %s", got, err, want)
		}
	}
	if changed, err := Remove(t.Context(), files, "hutch-a"); err != nil || !cmp.Equal(changed, files) {
		t.Errorf("removed from %v, %v", changed, err)
	}
	delete(env, "KUBECONFIG")
	if files, err := Files(getenv); err != nil || !cmp.Equal(files, []string{filepath.Join(dir, ".kube/config")}) {
		t.Errorf("files %v, %v", files, err)
	}
	if _, err := Files(func(string) string { return "" }); err == nil {
		t.Error("no HOME is no error")
	}
}

// TestConcurrentMerges has many writers at once, and a kubectl that holds its lock.
func TestConcurrentMerges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	write(t, file, theirs, 0o600)
	lock := file + ".lock"
	write(t, lock, "", 0o600)
	const n = 20
	var all sync.WaitGroup
	for i := range n {
		e := entries(t, fmt.Sprint(i), caOne)
		all.Go(func() {
			if _, err := Merge(t.Context(), []string{file}, e, false); err != nil {
				t.Error(err)
			}
		})
	}
	// All wait now, or will: for one another, and one of them for kubectl.
	for dir := filepath.Dir(file); !locked(t, dir); {
		if t.Context().Err() != nil {
			return
		}
	}
	if got := readFile(t, file); got != theirs {
		t.Error("changed under kubectl's lock")
	}
	os.Remove(lock)
	all.Wait()
	c, err := clientcmd.LoadFromFile(file)
	if err != nil || len(c.Clusters) != n+1 || len(c.AuthInfos) != n+1 || len(c.Contexts) != n+1 {
		t.Errorf("%d clusters, %v", len(c.Clusters), err)
	}
	if list, _ := os.ReadDir(filepath.Dir(file)); len(list) != 1 {
		t.Errorf("left behind: %v", list)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	write(t, lock, "", 0o600)
	if _, err := Merge(ctx, []string{file}, entries(t, "x", caOne), false); err == nil || !strings.Contains(err.Error(), "left that file behind") {
		t.Errorf("a lock that stays: %v", err)
	}
}

func locked(t *testing.T, dir string) bool {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

// TestHostileKubeconfig reads what a hostile guest could hand out.
func TestHostileKubeconfig(t *testing.T) {
	for name, text := range map[string]string{
		"exec":     strings.Replace(fmt.Sprintf(guest, caOne), "client-key-data: a2V5", "exec: {apiVersion: client.authentication.k8s.io/v1, command: rm, interactiveMode: Never}", 1),
		"file":     strings.Replace(fmt.Sprintf(guest, caOne), "client-key-data: a2V5", "client-key: /root/.ssh/id_rsa", 1),
		"token":    strings.Replace(fmt.Sprintf(guest, caOne), "client-key-data: a2V5", "tokenFile: /etc/shadow", 1),
		"proxy":    strings.Replace(fmt.Sprintf(guest, caOne), `server: "`, `proxy-url: http://evil.example, server: "`, 1),
		"insecure": strings.Replace(fmt.Sprintf(guest, caOne), `server: "`, `insecure-skip-tls-verify: true, server: "`, 1),
		"context":  strings.Replace(fmt.Sprintf(guest, caOne), "name: hutch, context", "name: other, context", 1),
		"user":     strings.Replace(fmt.Sprintf(guest, caOne), "users:\n- {name: hutch", "users:\n- {name: other", 1),
		"garbage":  "\x00{",
	} {
		if _, err := New([]byte(text), "hutch", "hutch-a", "https://127.0.0.1:1", ""); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}
