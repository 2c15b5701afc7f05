package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fetchTimeout bounds the fetching of packages.
const fetchTimeout = 5 * time.Minute

// DockerClient returns the path of Debian's docker client. The package is
// unpacked in .cache and never installed, for it would start a daemon.
func DockerClient(t testing.TB) string {
	t.Helper()
	name := "docker.io" // client and daemon in one package
	if exists("docker-cli") {
		name = "docker-cli"
	}
	return filepath.Join(unpacked(t, "docker-client", func() []string { return []string{name} }, "usr/bin/docker"), "usr/bin/docker")
}

// DockerCompose returns a command line, to be extended, of Debian's
// docker-compose with the modules of Python that this host lacks, and its
// environment.
func DockerCompose(t testing.TB) (args, env []string) {
	t.Helper()
	dir := unpacked(t, "docker-compose", func() []string { return needed(t, "docker-compose") }, "usr/bin/docker-compose")
	python := filepath.Join(dir, "usr/bin/python3")
	if _, err := os.Stat(python); err != nil {
		python = "/usr/bin/python3" // Debian's own, or it would have been fetched
	} else {
		libs, _ := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu"))
		env = append(env, "PYTHONHOME="+filepath.Join(dir, "usr"), "LD_LIBRARY_PATH="+strings.Join(libs, ":"))
	}
	env = append(env, "PYTHONPATH="+filepath.Join(dir, "usr/lib/python3/dist-packages"), "PYTHONDONTWRITEBYTECODE=1")
	return []string{python, filepath.Join(dir, "usr/bin/docker-compose")}, env
}

// exists tells whether the archive has a package.
func exists(name string) bool {
	out, err := exec.Command("apt-cache", "show", "--no-all-versions", name).Output()
	return err == nil && len(out) > 0
}

// needed lists a package and what it needs and this host lacks.
func needed(t testing.TB, name string) []string {
	t.Helper()
	out, err := exec.Command("apt-get", "-s", "--no-install-recommends", "install", name).Output()
	if err != nil {
		t.Fatalf("ask apt what %s needs: %v", name, err)
	}
	var list []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "Inst" {
			list = append(list, f[1])
		}
	}
	return list
}

// unpacked returns a directory of .cache with the contents of packages, which
// it fetches with the host's apt when want is not in there.
func unpacked(t testing.TB, name string, packages func() []string, want string) string {
	t.Helper()
	cache := filepath.Join(Repo(t), ".cache", "debian")
	dir := filepath.Join(cache, name)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	defer lock(t, dir+".lock")()
	if _, err := os.Stat(filepath.Join(dir, want)); err == nil {
		return dir
	}
	work, err := os.MkdirTemp(cache, "new-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(work)
	tree := filepath.Join(work, "tree")
	if err := fetch(work, tree, packages()); err != nil {
		t.Fatalf("fetch %s: %v", name, err)
	}
	if _, err := os.Stat(filepath.Join(tree, want)); err != nil {
		t.Fatalf("the packages of %s lack it: %v", name, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tree, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// fetch downloads packages into a directory and unpacks them into tree. apt
// checks their signatures.
func fetch(work, tree string, packages []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	c := exec.CommandContext(ctx, "apt-get", slices.Concat([]string{"-q", "-o", "APT::Sandbox::User=root", "download"}, packages)...)
	c.Dir = work
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download: %w: %s", err, out)
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) < len(packages) {
		return fmt.Errorf("apt-get download fetched %d packages of %d: %w", len(debs), len(packages), err)
	}
	for _, deb := range debs {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", deb, tree).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", deb, err, out)
		}
	}
	return nil
}

// lock keeps other tests from a file until the returned function.
func lock(t testing.TB, path string) (unlock func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { f.Close() }
}
