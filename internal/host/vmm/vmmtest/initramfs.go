package vmmtest

import (
	"bytes"
	"context"
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
	var a archive
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		a.add(entry{name: d, mode: unix.S_IFDIR | 0o755})
	}
	// Without a console node the kernel gives init no output.
	a.add(entry{name: "dev/console", mode: unix.S_IFCHR | 0o600, major: 5, minor: 1})
	b, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	a.add(entry{name: "init", mode: unix.S_IFREG | 0o755, data: b})
	found := 0
	for i, m := range modules() {
		b, err := os.ReadFile(filepath.Join(modulesDir, "kernel", m+".ko"))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		found++
		a.add(entry{name: fmt.Sprintf("modules/%02d-%s.ko", i, filepath.Base(m)), mode: unix.S_IFREG | 0o644, data: b})
	}
	if modulesDir != "" && found == 0 {
		return fmt.Errorf("no virtio modules in %s", modulesDir)
	}
	a.add(entry{name: "TRAILER!!!"})
	return os.WriteFile(path, a.Bytes(), 0o644)
}

// archive is a cpio archive in the "newc" form that the kernel unpacks; see
// the kernel's driver-api/early-userspace/buffer-format.
type archive struct {
	bytes.Buffer
	inode int
}

type entry struct {
	name         string
	mode         uint32
	major, minor uint32 // of a device
	data         []byte
}

func (a *archive) add(e entry) {
	a.inode++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, e.mode, 0, 0, 1, 0, len(e.data), 0, 0, e.major, e.minor, len(e.name)+1, 0, e.name)
	a.pad()
	a.Write(e.data)
	a.pad()
}

func (a *archive) pad() { a.Write(make([]byte, -a.Len()&3)) }
