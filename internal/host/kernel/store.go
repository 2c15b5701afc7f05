package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/hutch-run/hutch/internal/fault"
)

// Store keeps the packs below one directory. Its methods may be called by
// several processes, one after the other; readers need no lock.
type Store struct {
	dir string
}

// Open returns the store in <root>/kernels, which it makes if need be.
func Open(root string) (*Store, error) {
	dir := filepath.Join(root, "kernels")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("open kernel store: %w", err)
	}
	return &Store{dir: dir}, nil
}

// Current returns the current pack. Without one it is a fault.Precondition
// that says how to make one.
func (s *Store) Current() (Pack, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, "current"))
	if errors.Is(err, os.ErrNotExist) {
		return Pack{}, fault.New(fault.Precondition, "no kernel pack: run hutchd setup first")
	}
	if err != nil {
		return Pack{}, fmt.Errorf("read current kernel pack: %w", err)
	}
	return s.Get(strings.TrimSpace(string(b)))
}

// Get returns one pack by its id.
func (s *Store) Get(id string) (Pack, error) {
	dir := filepath.Join(s.dir, filepath.Base(id))
	b, err := os.ReadFile(filepath.Join(dir, "pack.json"))
	if errors.Is(err, os.ErrNotExist) {
		return Pack{}, fault.New(fault.NotFound, "no kernel pack %q: run hutchd setup", id)
	}
	if err != nil {
		return Pack{}, fmt.Errorf("read kernel pack: %w", err)
	}
	var p Pack
	if err := json.Unmarshal(b, &p); err != nil {
		return Pack{}, fmt.Errorf("read kernel pack %s: %w", id, err)
	}
	if p.Version != Version {
		return Pack{}, fault.New(fault.Precondition, "kernel pack %s has format %d, this hutchd reads %d: run hutchd setup", id, p.Version, Version)
	}
	p = p.at(dir)
	for _, part := range []string{p.Kernel, p.Initrd, p.Modules} {
		if _, err := os.Stat(part); err != nil {
			return Pack{}, fault.New(fault.Precondition, "kernel pack %s is not whole: run hutchd setup: %w", id, err)
		}
	}
	return p, nil
}

func (p Pack) at(dir string) Pack {
	p.Kernel = filepath.Join(dir, "vmlinux")
	p.Initrd = filepath.Join(dir, "initrd.cpio")
	p.Modules = filepath.Join(dir, "modules.ext4")
	return p
}

// Build makes a pack of a source and an agent binary, and makes it current.
// The same input gives the same pack. On error nothing is left behind.
func (s *Store) Build(ctx context.Context, src Source, agent string) (Pack, error) {
	tmp, err := os.MkdirTemp(s.dir, ".build-")
	if err != nil {
		return Pack{}, fmt.Errorf("build kernel pack: %w", err)
	}
	defer os.RemoveAll(tmp)
	p := Pack{Version: Version, Release: filepath.Base(src.Modules), Source: src.Name}.at(tmp)
	tree, err := readModuleTree(src.Modules)
	if err != nil {
		return Pack{}, err
	}
	order, err := tree.loadOrder(BootModules())
	if err != nil {
		return Pack{}, err
	}
	if err := writeKernel(p.Kernel, src.Kernel); err != nil {
		return Pack{}, err
	}
	if err := writeModulesDisk(p.Modules, src.Modules); err != nil {
		return Pack{}, err
	}
	if err := ctx.Err(); err != nil {
		return Pack{}, fmt.Errorf("build kernel pack: %w", err)
	}
	// The boot modules stay beside the pack, so that a new agent needs no
	// kernel package to build its initramfs.
	boot := filepath.Join(tmp, "boot-modules")
	if order, err = copyModules(boot, order); err != nil {
		return Pack{}, err
	}
	return s.finish(p, tmp, agent, order)
}

// Refresh returns the current pack, made again if it carries another agent
// than the given one.
func (s *Store) Refresh(agent string) (Pack, error) {
	cur, err := s.Current()
	if err != nil {
		return Pack{}, err
	}
	digest, err := digestFile(agent)
	if err != nil {
		return Pack{}, err
	}
	if digest == cur.AgentDigest {
		return cur, nil
	}
	tmp, err := os.MkdirTemp(s.dir, ".build-")
	if err != nil {
		return Pack{}, fmt.Errorf("refresh kernel pack: %w", err)
	}
	defer os.RemoveAll(tmp)
	p := Pack{Version: Version, Release: cur.Release, Source: cur.Source}.at(tmp)
	if err := errors.Join(os.Link(cur.Kernel, p.Kernel), os.Link(cur.Modules, p.Modules)); err != nil {
		return Pack{}, fmt.Errorf("refresh kernel pack: %w", err)
	}
	old, err := filepath.Glob(filepath.Join(filepath.Dir(cur.Kernel), "boot-modules", "*", "*.ko"))
	if err != nil {
		return Pack{}, fmt.Errorf("refresh kernel pack: %w", err)
	}
	order, err := copyModules(filepath.Join(tmp, "boot-modules"), old)
	if err != nil {
		return Pack{}, err
	}
	return s.finish(p, tmp, agent, order)
}

// finish adds the initramfs and the manifest to the pack being made in tmp,
// gives it its id and its place, and makes it current.
func (s *Store) finish(p Pack, tmp, agent string, modules []string) (Pack, error) {
	f, err := os.OpenFile(p.Initrd, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return Pack{}, fmt.Errorf("write initramfs: %w", err)
	}
	err = errors.Join(WriteInitrd(f, agent, modules), f.Sync(), f.Close())
	if err != nil {
		return Pack{}, fmt.Errorf("write initramfs: %w", err)
	}
	if p.AgentDigest, err = digestFile(agent); err != nil {
		return Pack{}, err
	}
	sum := sha256.New()
	for _, part := range []string{p.Kernel, p.Initrd, p.Modules} {
		d, err := digestFile(part)
		if err != nil {
			return Pack{}, err
		}
		fmt.Fprintln(sum, d)
	}
	p.ID = hex.EncodeToString(sum.Sum(nil))[:16]
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return Pack{}, fmt.Errorf("write pack.json: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(tmp, "pack.json"), append(b, '\n'), 0o644); err != nil {
		return Pack{}, fmt.Errorf("write pack.json: %w", err)
	}
	return s.publish(p, tmp)
}

func (s *Store) publish(p Pack, tmp string) (Pack, error) {
	dir := filepath.Join(s.dir, p.ID)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return Pack{}, fmt.Errorf("publish kernel pack: %w", err)
	}
	err := os.Rename(tmp, dir)
	if err != nil && !errors.Is(err, os.ErrExist) {
		return Pack{}, fmt.Errorf("publish kernel pack: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(s.dir, "current"), []byte(p.ID+"\n"), 0o644); err != nil {
		return Pack{}, fmt.Errorf("publish kernel pack: %w", err)
	}
	return p.at(dir), nil
}

// Reclaim removes every pack that is neither current nor in use, and what an
// interrupted build left.
func (s *Store) Reclaim(inUse map[string]bool) error {
	cur, err := s.Current()
	if err != nil && !fault.Is(err, fault.Precondition) {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("list kernel packs: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && e.Name() != cur.ID && !inUse[e.Name()] {
			errs = append(errs, os.RemoveAll(filepath.Join(s.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// copyModules copies module files into dir under names that keep their order.
func copyModules(dir string, files []string) ([]string, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("keep boot modules: %w", err)
	}
	var out []string
	for i, f := range files {
		b, err := readModule(f)
		if err != nil {
			return nil, err
		}
		sub := filepath.Join(dir, fmt.Sprintf("%02d", i))
		if err := os.Mkdir(sub, 0o755); err != nil {
			return nil, fmt.Errorf("keep boot modules: %w", err)
		}
		to := filepath.Join(sub, moduleName(f)+".ko")
		if err := os.WriteFile(to, b, 0o644); err != nil {
			return nil, fmt.Errorf("keep boot modules: %w", err)
		}
		out = append(out, to)
	}
	return out, nil
}

func digestFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("digest: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("digest %s: %w", path, err)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}
