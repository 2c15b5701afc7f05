package kernel

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Source is a kernel and its modules, as files on the host.
type Source struct {
	Kernel  string // vmlinuz
	Modules string // directory named by the release, as /lib/modules/<release>
	Name    string // where it came from, for people
}

// Files returns a source of files that the host has. modules is the directory
// of one release; its name is the release.
func Files(kernel, modules string) (Source, error) {
	if _, err := os.Stat(kernel); err != nil {
		return Source{}, fmt.Errorf("given kernel: %w", err)
	}
	if _, err := os.Stat(filepath.Join(modules, "modules.builtin")); err != nil {
		return Source{}, fmt.Errorf("given modules directory: %w (it should be like /lib/modules/<release>)", err)
	}
	return Source{Kernel: kernel, Modules: modules, Name: kernel}, nil
}

// debianPackage is the package whose dependency names the current kernel.
const debianPackage = "linux-image-cloud-amd64"

// FetchDebian downloads Debian's cloud kernel through apt and unpacks it below
// dir, without installing it. It needs apt, dpkg and kmod; package lists that
// do not know the kernel are fetched anew.
func FetchDebian(ctx context.Context, dir string) (Source, error) {
	name, err := resolveDebian(ctx)
	if err != nil {
		if _, err = run(ctx, dir, "apt-get", "update"); err == nil {
			name, err = resolveDebian(ctx)
		}
	}
	if err != nil {
		return Source{}, err
	}
	if _, err := run(ctx, dir, "apt-get", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
		return Source{}, err
	}
	debs, err := filepath.Glob(filepath.Join(dir, name+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return Source{}, fmt.Errorf("download %s: found %d packages in %s, want 1", name, len(debs), dir)
	}
	tree := filepath.Join(dir, "tree")
	if _, err := run(ctx, dir, "dpkg-deb", "-x", debs[0], tree); err != nil {
		return Source{}, err
	}
	release := strings.TrimPrefix(name, "linux-image-")
	if _, err := run(ctx, dir, "depmod", "-b", tree, release); err != nil {
		return Source{}, err
	}
	version := strings.TrimSuffix(filepath.Base(debs[0]), ".deb")
	return Source{
		Kernel:  filepath.Join(tree, "boot/vmlinuz-"+release),
		Modules: filepath.Join(tree, "lib/modules", release),
		Name:    "debian:" + version,
	}, nil
}

// resolveDebian returns the name of the package that holds the kernel itself.
func resolveDebian(ctx context.Context) (string, error) {
	out, err := run(ctx, "/", "apt-cache", "depends", "--important", debianPackage)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if _, name, ok := strings.Cut(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(name, "linux-image-") {
			return name, nil
		}
	}
	return "", fmt.Errorf("apt knows no %s: give a kernel and a modules directory instead", debianPackage)
}

// run runs a tool and returns what it printed; its error carries the tool's
// last words.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, lastLine(stderr.String()))
	}
	return stdout.String(), nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
