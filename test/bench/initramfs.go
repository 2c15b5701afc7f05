package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/hutch-run/hutch/internal/host/kernel"
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
	initrd := filepath.Join(dir, "bare-initrd.cpio")
	f, err := os.Create(initrd)
	if err != nil {
		return "", err
	}
	return initrd, errors.Join(kernel.WriteInitrd(f, program, modules), f.Close())
}
