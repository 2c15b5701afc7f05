package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// agentImage writes a disk of the files of another and QEMU's guest agent, whose
// package is fetched and not installed here. Its libraries are this host's, which
// QEMU needs as well.
func agentImage(ctx context.Context, from, dir string) (string, error) {
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "root.img")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	if err := runIn(ctx, dir, "debugfs", "-R", "rdump / "+tree, from); err != nil {
		return "", err
	}
	if err := runIn(ctx, dir, "apt-get", "-o", "APT::Sandbox::User=root", "download", "qemu-guest-agent"); err != nil {
		return "", err
	}
	packages, err := filepath.Glob(filepath.Join(dir, "qemu-guest-agent_*.deb"))
	if err != nil || len(packages) != 1 {
		return "", errors.Join(fmt.Errorf("%d packages were fetched, want one", len(packages)), err)
	}
	if err := runIn(ctx, dir, "dpkg-deb", "-x", packages[0], "package"); err != nil {
		return "", err
	}
	agent := filepath.Join(dir, "package/usr/sbin/qemu-ga")
	if err := copyFile(agent, filepath.Join(tree, "usr/sbin/qemu-ga")); err != nil {
		return "", err
	}
	if err := copyLibraries(ctx, agent, tree); err != nil {
		return "", err
	}
	if err := os.RemoveAll(filepath.Join(tree, "lost+found")); err != nil {
		return "", err
	}
	return image, runIn(ctx, dir, "mke2fs", "-q", "-t", "ext4", "-d", tree, image, "64M")
}

// copyLibraries copies what a program is linked with, as ldd(1) tells, to the
// same places below tree.
func copyLibraries(ctx context.Context, program, tree string) error {
	out, err := exec.CommandContext(ctx, "ldd", program).Output()
	if err != nil {
		return fmt.Errorf("ask for the libraries of %s: %w", program, err)
	}
	for _, word := range strings.Fields(string(out)) {
		if word == "not" {
			return fmt.Errorf("libraries of %s are missing here: %s", program, out)
		}
		if !strings.HasPrefix(word, "/") {
			continue
		}
		real, err := filepath.EvalSymlinks(filepath.Dir(word)) // /lib is a link in both trees
		if err != nil {
			return err
		}
		dir := filepath.Join(tree, real)
		if err := errors.Join(os.MkdirAll(dir, 0o755), copyFile(word, filepath.Join(dir, filepath.Base(word)))); err != nil {
			return err
		}
	}
	return nil
}

// copyFile makes to a new program with the content of from.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // a link there would be followed
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// runIn runs a program in a directory.
func runIn(ctx context.Context, dir string, argv ...string) error {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", argv[0], err, lastLine(out))
	}
	return nil
}
