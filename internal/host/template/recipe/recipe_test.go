package recipe

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/image"
	"github.com/hutch-run/hutch/internal/testenv"
)

func newStore(t *testing.T) *image.Store {
	t.Helper()
	root := t.TempDir()
	s, err := image.Open(image.Params{Images: root + "/images", Work: root + "/work", Trash: root + "/trash"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// built makes a recipe and an image of it, and returns the image's path.
func built(t *testing.T, s *image.Store, name string) (image.Manifest, string) {
	t.Helper()
	return builtWith(t, s, name, t.TempDir())
}

// builtWith is built with a directory of hutch's programs.
func builtWith(t *testing.T, s *image.Store, name, programs string) (image.Manifest, string) {
	t.Helper()
	r, err := Find(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx := testenv.Context(t)
	fs, err := r.Make(ctx, Params{Work: t.TempDir(), Programs: programs})
	if err != nil {
		t.Fatalf("make %s: %v", name, err)
	}
	img, err := s.Build(ctx, image.Source{Stream: fs.Tar, Kind: image.RootTar, Clamp: fs.Clamp, Config: &r.Config}, nil)
	if err := errors.Join(err, fs.Close()); err != nil {
		t.Fatalf("build %s: %v", name, err)
	}
	img.Release()
	p, err := s.Path(img.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", p).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	return img.Manifest, p
}

func debugfs(t *testing.T, path, format string, args ...any) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", fmt.Sprintf(format, args...), path).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs: %v\n%s", err, out)
	}
	return string(out)
}

// wantFiles checks that paths exist in an image, or with a leading "!" that
// they do not.
func wantFiles(t *testing.T, image string, paths ...string) {
	t.Helper()
	for _, p := range paths {
		name, absent := strings.CutPrefix(p, "!")
		if there := strings.Contains(debugfs(t, image, "stat %s", name), "Inode:"); there == absent {
			t.Errorf("%s: there %v, want %v", name, there, !absent)
		}
	}
}

// TestMinimal builds minimal for real, twice.
func TestMinimal(t *testing.T) {
	testenv.RequireRoot(t)
	s := newStore(t)
	m, p := built(t, s, "minimal")
	t.Logf("minimal: %d bytes, %d entries", m.Size, m.Entries)
	if m.Size > 15<<20 {
		t.Errorf("minimal is %d bytes, more than 15 MiB", m.Size)
	}
	wantFiles(t, p, "/usr/bin/busybox", "/usr/bin/sh", "/usr/bin/tar", "/usr/bin/wget", "/usr/bin/vi", "/usr/bin/top", "/usr/bin/ps", "/usr/sbin/ip",
		"/bin", "/etc/passwd", "/etc/os-release", "/etc/ssl/certs/ca-certificates.crt", "/tmp", "/proc", "/home/user", "!/usr/sbin/init", "!/etc/resolv.conf",
		"/usr/share/doc/busybox/copyright", "/usr/share/doc/libc6/copyright")
	if got := debugfs(t, p, "cat /usr/lib/os-release"); !strings.Contains(got, "ID=debian") || !strings.Contains(got, "VARIANT_ID=hutch-minimal") {
		t.Errorf("os-release:\n%s", got)
	}
	if got := strings.Count(debugfs(t, p, "cat /etc/ssl/certs/ca-certificates.crt"), "BEGIN CERTIFICATE"); got < 50 {
		t.Errorf("%d certificates", got)
	}
	runsByItself(t, p)
	if m2, _ := built(t, s, "minimal"); m2.Digest != m.Digest {
		t.Errorf("built again it is %s, not %s", m2.Digest, m.Digest)
	}
}

// runsByItself starts busybox with the image's own loader and libraries and
// nothing else of the image; it is Debian's program, not a stranger's.
func runsByItself(t *testing.T, image string) {
	t.Helper()
	dir := t.TempDir()
	debugfs(t, image, "rdump /usr/lib %s", dir)
	debugfs(t, image, "dump /usr/bin/busybox %s", filepath.Join(dir, "busybox"))
	libs, err := filepath.Glob(filepath.Join(dir, "lib", "*-linux-gnu*"))
	if err != nil || len(libs) != 1 {
		t.Fatalf("the libraries are in %q, %v", libs, err)
	}
	loader, err := filepath.Glob(filepath.Join(libs[0], "ld-linux*.so.*"))
	if err != nil || len(loader) != 1 {
		t.Fatalf("the loader is %q, %v", loader, err)
	}
	if err := os.Chmod(filepath.Join(dir, "busybox"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ applet, arg, want string }{
		{"sh", "-c", "sandbox 42"}, {"wget", "--help", "Usage: wget"}, {"ip", "--help", "Usage: ip"}, {"vi", "--help", "Usage: vi"},
		{"top", "--help", "Usage: top"}, {"ps", "--help", "Usage: ps"}, {"tar", "--help", "Usage: tar"},
	} {
		args := []string{"--library-path", libs[0], filepath.Join(dir, "busybox"), c.applet, c.arg}
		if c.applet == "sh" {
			args = append(args, "echo sandbox $((6*7))")
		}
		out, err := exec.CommandContext(testenv.Context(t), loader[0], args...).CombinedOutput()
		if !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %v\n%s", c.applet, err, out)
		}
	}
}

// TestDebian builds debian twice, for real: minutes.
func TestDebian(t *testing.T) {
	testenv.RequireRoot(t)
	if testing.Short() {
		t.Skip("takes minutes")
	}
	s := newStore(t)
	m, p := built(t, s, "debian")
	t.Logf("debian: %d bytes, %d entries", m.Size, m.Entries)
	wantFiles(t, p, "/usr/bin/apt-get", "/usr/bin/bash", "/usr/bin/ps", "/usr/sbin/ip", "/etc/apt/sources.list.d/debian.sources", "/home/user",
		keyring, "/var/lib/apt/lists", "/etc/ssl/certs/ca-certificates.crt", "!/etc/resolv.conf", "!/etc/apt/apt.conf.d/99mmdebstrap", "!/dev/null", "!/etc/hostname")
	if got := debugfs(t, p, "cat /etc/passwd"); !strings.Contains(got, "\nuser:x:1000:") || !strings.HasPrefix(got[strings.Index(got, "root:"):], "root:x:0:0:") {
		t.Errorf("passwd:\n%s", got)
	}
	if m2, p2 := built(t, s, "debian"); m2.Digest != m.Digest {
		t.Errorf("built again it is %s, not %s (files %s and %s)", m2.Digest, m.Digest, p, p2)
	}
}

// TestPython311 builds python311 for real.
func TestPython311(t *testing.T) {
	testenv.RequireRoot(t)
	if testing.Short() {
		t.Skip("takes minutes")
	}
	m, p := built(t, newStore(t), "python311")
	t.Logf("python311: %d bytes, %d entries", m.Size, m.Entries)
	wantFiles(t, p, "/usr/bin/python3.11", "/usr/bin/pip3", "/usr/lib/python3.11/venv/__init__.py")
}

// TestDocker builds docker for real, twice: the same packages are the same
// image.
func TestDocker(t *testing.T) {
	testenv.RequireRoot(t)
	if testing.Short() {
		t.Skip("takes minutes")
	}
	s := newStore(t)
	m, p := built(t, s, "docker")
	t.Logf("docker: %d bytes, %d entries", m.Size, m.Entries)
	wantFiles(t, p, "/usr/sbin/dockerd", "/usr/bin/docker", "/usr/bin/containerd", "/usr/bin/containerd-shim-runc-v2", "/usr/sbin/runc",
		"/usr/bin/docker-init", "/usr/sbin/docker-proxy", "/usr/sbin/iptables", "/usr/bin/kmod", "/usr/sbin/ip", "/etc/ssl/certs/ca-certificates.crt",
		"!/etc/init.d/docker", "!/usr/lib/systemd/system/docker.service", "!/usr/lib/systemd/systemd", "!/etc/docker/key.json")
	if got := debugfs(t, p, "cat /etc/group"); !strings.Contains(got, "docker:x:") {
		t.Errorf("groups:\n%s", got)
	}
	if m2, _ := built(t, s, "docker"); m2.Digest != m.Digest {
		t.Errorf("built again it is %s, not %s", m2.Digest, m.Digest)
	}
}

// TestKubernetes builds kubernetes for real, around a program that stands in
// for hutch-kube.
func TestKubernetes(t *testing.T) {
	testenv.RequireRoot(t)
	if testing.Short() {
		t.Skip("takes minutes")
	}
	programs := t.TempDir()
	for name, text := range map[string]string{"hutch-kube": "#!/bin/sh\n", "hutch-kube.json": "{}"} {
		if err := os.WriteFile(filepath.Join(programs, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m, p := builtWith(t, newStore(t), "kubernetes", programs)
	t.Logf("kubernetes: %d bytes, %d entries", m.Size, m.Entries)
	wantFiles(t, p, "/usr/bin/containerd", "/usr/sbin/runc", "/usr/lib/cni/bridge", "/usr/sbin/iptables", "/usr/sbin/nft", "/usr/sbin/conntrack",
		"/usr/sbin/ethtool", "/usr/sbin/ipset", "/usr/bin/kmod", "/usr/bin/mount", "/usr/bin/socat", "/usr/local/bin/hutch-kube", "/usr/local/bin/kubectl",
		"/usr/lib/hutch/kubernetes.json", "!/usr/sbin/dockerd", "!/usr/lib/systemd/systemd")
	if got := debugfs(t, p, "cat /etc/containerd/config.toml"); !strings.Contains(got, "sandbox_image") {
		t.Errorf("containerd's configuration:\n%s", got)
	}
}

func TestKubernetesNeedsItsProgram(t *testing.T) {
	r, err := Find("kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Make(testenv.Context(t), Params{Work: t.TempDir(), Programs: t.TempDir()})
	if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "make kube") {
		t.Errorf("error = %v", err)
	}
}

func TestFind(t *testing.T) {
	if diff := cmp.Diff([]string{"debian", "docker", "kubernetes", "minimal", "python311"}, Names()); diff != "" {
		t.Error(diff)
	}
	if _, err := Find("windows"); !fault.Is(err, fault.NotFound) || !strings.Contains(err.Error(), "minimal") {
		t.Errorf("an unknown recipe: %v", err)
	}
}

// deb makes a package.
func deb(t *testing.T, control string, items map[string]string) []byte {
	t.Helper()
	pack := func(files map[string]string) []byte {
		var buf bytes.Buffer
		tw := tar.NewWriter(&buf)
		for name, body := range files {
			if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(tw, body); err != nil {
				t.Fatal(err)
			}
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	var out bytes.Buffer
	out.WriteString(arMagic)
	member := func(name string, b []byte) {
		fmt.Fprintf(&out, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", name, 0, 0, 0, 0o644, len(b))
		out.Write(b)
		if len(b)%2 == 1 {
			out.WriteByte('\n')
		}
	}
	member("debian-binary", []byte("2.0\nx"))
	member("control.tar", pack(map[string]string{"./control": control}))
	member("data.tar", pack(items))
	return out.Bytes()
}

func TestReadDeb(t *testing.T) {
	good := deb(t, "Package: p\nDepends: a, gcc-12-base\nDescription: x\n y: z\n", map[string]string{"./usr/x": "body"})
	var got []string
	read := func(b []byte) (map[string]string, error) {
		got = nil
		return readDebStream(bytes.NewReader(b), func(h *tar.Header, r io.Reader) error {
			body, err := io.ReadAll(r)
			got = append(got, h.Name+"="+string(body))
			return err
		})
	}
	control, err := read(good)
	if err != nil || len(got) != 1 || got[0] != "./usr/x=body" {
		t.Errorf("%v, %v", got, err)
	}
	want := map[string]string{"Package": "p", "Depends": "a, gcc-12-base", "Description": "x"}
	if diff := cmp.Diff(want, control); diff != "" {
		t.Error(diff)
	}
	for what, bad := range map[string][]byte{
		"empty": nil, "text": []byte("hello, this is no package"), "magic only": good[:8], "cut in a header": good[:30],
		"cut in the data": good[:len(good)-3000], "bad size": append(append(bytes.Clone(good[:56]), "xxxxxxxxxx"...), good[66:]...),
		"unknown packing": bytes.Replace(good, []byte("data.tar        "), []byte("data.tar.lzma   "), 1),
	} {
		if _, err := read(bad); err == nil {
			t.Errorf("%s was read: %v", what, got)
		}
	}
}

func TestApplets(t *testing.T) {
	list := "junk\x00[\x00[[\x00ash\x00init\x00ip\x00linuxrc\x00ps\x00sh\x00tar\x00top\x00vi\x00wget\x00\x00more"
	got, err := applets([]byte(list))
	if diff := cmp.Diff([]string{"[", "[[", "ash", "ip", "ps", "sh", "tar", "top", "vi", "wget"}, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	for _, bad := range []string{"", "no list", strings.Replace(list, "wget", "xget", 1)} {
		if _, err := applets([]byte(bad)); !fault.Is(err, fault.Precondition) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestMerged(t *testing.T) {
	for in, want := range map[string]string{"bin/sh": "usr/bin/sh", "lib64/ld.so": "usr/lib64/ld.so", "lib": "usr/lib", "usr/bin/x": "usr/bin/x", "library/x": "library/x", "etc/lib": "etc/lib"} {
		if got := merged(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestSources(t *testing.T) {
	list := []target{
		{"http://u:pw@mirror.invalid/debian/", "bookworm", "main"},
		{"http://u:pw@mirror.invalid/debian/", "bookworm", "contrib"},
		{"http://mirror.invalid/security/", "bookworm-security", "main"},
	}
	want := `Types: deb
URIs: http://mirror.invalid/debian/
Suites: bookworm
Components: main contrib
Signed-By: ` + keyring + `

Types: deb
URIs: http://mirror.invalid/security/
Suites: bookworm-security
Components: main
Signed-By: ` + keyring + "\n"
	if diff := cmp.Diff(want, sources(list, true)); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(sources(list, false), "u:pw@") {
		t.Error("the build needs the credentials")
	}
}

func TestAcquireOptionsKeepToReaching(t *testing.T) {
	for line, want := range map[string]bool{
		`Acquire::http::Proxy "http://10.0.0.1:3128";`: true,
		`Acquire::https::mirror.invalid::Verify "no";`: true,
		`Acquire::Check-Valid-Until "false";`:          true,
		`Acquire::Languages "none";`:                   false,
		`Acquire::http "";`:                            false,
		`Acquire::AllowInsecureRepositories "1";`:      false,
	} {
		if got := reach.MatchString(line); got != want {
			t.Errorf("%s: %v", line, got)
		}
	}
}

func TestClean(t *testing.T) {
	testenv.CheckGoroutines(t)
	began := time.Unix(1_700_000_000, 0)
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	put := func(name, body string) {
		h := tar.Header{Name: "./" + name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}
		if strings.HasSuffix(name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, body); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{
		"dev/", "dev/null", "dev/shm/", "etc/resolv.conf", "etc/passwd-", "etc/apt/sources.list", "etc/apt/sources.list.d/", "etc/apt/sources.list.d/0000x.sources",
		"etc/apt/apt.conf.d/99mmdebstrap", "etc/apt/apt.conf.d/70debconf", "var/cache/apt/", "var/cache/apt/archives/", "var/cache/apt/archives/lock", "var/log/apt/", "var/log/apt/term.log",
		"usr/share/doc/", "usr/share/doc/x/", "usr/share/doc/x/copyright", "usr/share/doc/x/README", "usr/share/doc/x/examples/", "usr/share/locale/", "usr/share/locale/locale.alias", "usr/share/locale/de/", "usr/share/locale/de/x.mo",
		"usr/bin/x", "var/lib/dpkg/status", "var/lib/dpkg/status-old",
		"etc/init.d/", "etc/init.d/docker", "etc/rc2.d/S01docker", "usr/lib/systemd/system/docker.service", "etc/default/docker", "etc/default/docker-not", "etc/initramfs",
	} {
		put(name, "")
	}
	put("etc/machine-id", "0123\n")
	put("etc/shadow", "root:*:20779:0:99999:7:::\n_apt:!:20779::::::\n")
	put("etc/passwd", "root:x:0:0::/:/bin/sh\n")
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(file, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	kube := filepath.Join(t.TempDir(), "kube")
	if err := os.WriteFile(kube, []byte("a program"), 0o600); err != nil {
		t.Fatal(err)
	}
	fs, err := clean(file, began, additions{
		sources: "the sources\n", without: starters(),
		extras: []extra{{name: "usr/bin/x", text: "ours"}, {name: "usr/bin/kube", mode: 0o755, file: kube}, {name: "usr/bin/ctl", link: "kube"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for tr := tar.NewReader(fs.Tar); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		got[strings.TrimPrefix(h.Name, "./")] = string(b)
	}
	want := map[string]string{
		"dev/": "", "etc/apt/sources.list.d/": "", "etc/apt/apt.conf.d/70debconf": "", "var/cache/apt/": "", "var/cache/apt/archives/": "", "var/log/apt/": "",
		"usr/share/doc/": "", "usr/share/doc/x/": "", "usr/share/doc/x/copyright": "", "usr/share/locale/": "", "usr/share/locale/locale.alias": "",
		"usr/bin/x": "ours", "usr/bin/kube": "a program", "usr/bin/ctl": "", "var/lib/dpkg/status": "", "etc/machine-id": "", "home/user/": "", "etc/init.d/": "", "etc/default/docker-not": "", "etc/initramfs": "",
		"etc/shadow":                            "root:*:19000:0:99999:7:::\n_apt:!:19000::::::\nuser:!:19000:0:99999:7:::\n",
		"etc/passwd":                            "root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n",
		"etc/apt/sources.list.d/debian.sources": "the sources\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if err := fs.Close(); err != nil {
		t.Error(err)
	}
	// One that nobody reads must not leave its goroutine.
	if fs, err = clean(file, began, additions{}); err != nil {
		t.Fatal(err)
	}
	if err := fs.Close(); err != nil {
		t.Error(err)
	}
}

func TestCommandErrors(t *testing.T) {
	testenv.CheckGoroutines(t)
	r := runner{log: slog.New(slog.DiscardHandler)}
	var seen []string
	_, err := r.output(testenv.Context(t), command{name: "sh", args: []string{"-c", "echo one; echo two >&2; exit 3"}, line: func(s string) { seen = append(seen, s) }})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "two") || len(seen) != 2 {
		t.Errorf("%v, lines %q", err, seen)
	}
	if _, err := r.output(testenv.Context(t), command{name: "no-such-tool-here"}); !fault.Is(err, fault.Precondition) {
		t.Errorf("a tool that is not there: %v", err)
	}
	out, err := r.output(testenv.Context(t), command{name: "sh", args: []string{"-c", "echo out; echo err >&2"}})
	if err != nil || string(out) != "out\n" {
		t.Errorf("%q, %v", out, err)
	}
	ctx, cancel := context.WithCancelCause(testenv.Context(t))
	gone := errors.New("the caller left")
	_, err = r.output(ctx, command{name: "sh", args: []string{"-c", "sleep 1000 & echo started; wait"}, line: func(string) { cancel(gone) }})
	if !errors.Is(err, gone) {
		t.Errorf("cancelled: %v", err)
	}
	if err := archiveError(errors.New("E: Could not resolve 'mirror'")); !fault.Is(err, fault.Unavailable) {
		t.Errorf("an archive that is not there: %v", err)
	}
}
