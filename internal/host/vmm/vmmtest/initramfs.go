package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/kernel"
	"github.com/hutch-run/hutch/internal/testenv"
)

// Where the guest's kernel comes from. Unset: Debian's, fetched once into the
// user's cache directory.
const (
	kernelEnv  = "HUTCH_TEST_KERNEL"  // path of a bzImage or an ELF vmlinux
	modulesEnv = "HUTCH_TEST_MODULES" // its /lib/modules/<release>
)

// modules are loaded by guestinit in this order, each after what it needs. One
// that the kernel does not have as a file is built in.
func modules() []string {
	return []string{
		"drivers/virtio/virtio_ring", "drivers/virtio/virtio",
		"drivers/virtio/virtio_pci_legacy_dev", "drivers/virtio/virtio_pci_modern_dev", "drivers/virtio/virtio_pci",
		"drivers/char/virtio_console", "drivers/block/virtio_blk",
		"net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net",
	}
}

// Boot returns a kernel and an initramfs of the suite's guest, readable by
// every user.
func Boot(t testing.TB) (kernelPath, initrd string) {
	t.Helper()
	ctx := testenv.Context(t)
	src, err := source(ctx)
	if err != nil {
		t.Fatalf("get a kernel for the test's guest: %v", err)
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "init")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program,
		"github.com/hutch-run/hutch/internal/host/vmm/vmmtest/guestinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build guestinit: %v\n%s", err, out)
	}
	initrd = filepath.Join(dir, "initrd")
	if err := writeInitramfs(initrd, program, src.Modules); err != nil {
		t.Fatal(err)
	}
	return src.Kernel, initrd
}

// source finds the kernel, and fetches it when no run before did. Runs of
// several packages at once take turns.
func source(ctx context.Context) (kernel.Source, error) {
	if k := os.Getenv(kernelEnv); k != "" {
		return kernel.Source{Kernel: k, Modules: os.Getenv(modulesEnv)}, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return kernel.Source{}, err
	}
	dir := filepath.Join(cache, "hutch-test", "kernel")
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return kernel.Source{}, err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return kernel.Source{}, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return kernel.Source{}, err
	}
	kernels, _ := filepath.Glob(dir + "/tree/boot/vmlinuz-*")
	releases, _ := filepath.Glob(dir + "/tree/lib/modules/*")
	if len(kernels) == 1 && len(releases) == 1 {
		return kernel.Source{Kernel: kernels[0], Modules: releases[0]}, nil
	}
	fetch, err := os.MkdirTemp(filepath.Dir(dir), "fetch-")
	if err != nil {
		return kernel.Source{}, err
	}
	defer os.RemoveAll(fetch)
	src, err := kernel.FetchDebian(ctx, fetch)
	if err != nil {
		return kernel.Source{}, err
	}
	k, err := filepath.Rel(fetch, src.Kernel)
	if err != nil {
		return kernel.Source{}, err
	}
	m, err := filepath.Rel(fetch, src.Modules)
	if err != nil {
		return kernel.Source{}, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return kernel.Source{}, err
	}
	if err := os.Rename(fetch, dir); err != nil {
		return kernel.Source{}, err
	}
	return kernel.Source{Kernel: filepath.Join(dir, k), Modules: filepath.Join(dir, m)}, nil
}

func writeInitramfs(path, program, modulesDir string) error {
	var files []string
	for _, m := range modules() {
		file := filepath.Join(modulesDir, "kernel", m+".ko")
		if _, err := os.Stat(file); err == nil {
			files = append(files, file)
		} else if !os.IsNotExist(err) {
			return err
		}
	}
	if modulesDir != "" && len(files) == 0 {
		return fmt.Errorf("no virtio modules in %s", modulesDir)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(kernel.WriteInitrd(f, program, files), f.Chmod(0o644), f.Close())
}
