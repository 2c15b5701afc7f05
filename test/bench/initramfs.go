package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// buildInitramfs builds the bare guest and writes an initramfs of it and of
// the kernel pack's own boot modules.
func buildInitramfs(ctx context.Context, dir, pack string) (string, error) {
	program := filepath.Join(dir, "guestinit")
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./test/bench/guestinit")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the bare guest: %w\n%s", err, out)
	}
	modules, err := filepath.Glob(filepath.Join(pack, "boot-modules/*/*.ko"))
	if err != nil {
		return "", err
	}
	if len(modules) == 0 {
		return "", fmt.Errorf("no boot modules in %s", pack)
	}
	slices.Sort(modules)
	var a archive
	for _, d := range []string{"dev", "proc", "sys", "modules", "image", "data", "newroot"} {
		a.add(entry{name: d, mode: unix.S_IFDIR | 0o755})
	}
	// Without a console node the kernel gives init no output.
	a.add(entry{name: "dev/console", mode: unix.S_IFCHR | 0o600, major: 5, minor: 1})
	if err := a.addFile("init", 0o755, program); err != nil {
		return "", err
	}
	for i, m := range modules {
		if err := a.addFile(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(m)), 0o644, m); err != nil {
			return "", err
		}
	}
	a.add(entry{name: "TRAILER!!!"})
	initrd := filepath.Join(dir, "bare-initrd.cpio")
	return initrd, os.WriteFile(initrd, a.Bytes(), 0o644)
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

func (a *archive) addFile(name string, perm uint32, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	a.add(entry{name: name, mode: unix.S_IFREG | perm, data: b})
	return nil
}

func (a *archive) add(e entry) {
	a.inode++
	fmt.Fprintf(a, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, e.mode, 0, 0, 1, 0, len(e.data), 0, 0, e.major, e.minor, len(e.name)+1, 0, e.name)
	a.pad()
	a.Write(e.data)
	a.pad()
}

func (a *archive) pad() { a.Write(make([]byte, -a.Len()&3)) }
