package kernel

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// moduleTree is what a /lib/modules/<release> directory holds, by the module
// names that the kernel uses ("-" is "_").
type moduleTree struct {
	files   map[string]string // name → path
	builtin map[string]bool
}

func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModuleTree indexes dir.
func readModuleTree(dir string) (*moduleTree, error) {
	t := &moduleTree{files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.Contains(d.Name(), ".ko") {
			t.files[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	for _, line := range strings.Fields(string(b)) {
		t.builtin[moduleName(line)] = true
	}
	return t, nil
}

// loadOrder returns the files to load for the wanted modules, dependencies
// first.
func (t *moduleTree) loadOrder(wanted []string) ([]string, error) {
	var order []string
	seen := map[string]bool{}
	var visit func(name, by string) error
	visit = func(name, by string) error {
		if seen[name] || t.builtin[name] {
			return nil
		}
		seen[name] = true
		path, ok := t.files[name]
		if !ok {
			return fmt.Errorf("kernel module %s (needed by %s) is neither in the modules directory nor built in", name, by)
		}
		deps, err := moduleDeps(path)
		if err != nil {
			return err
		}
		for _, d := range deps {
			if err := visit(d, name); err != nil {
				return err
			}
		}
		order = append(order, path)
		return nil
	}
	for _, name := range wanted {
		if err := visit(name, "hutch"); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleDeps reads what a module says it depends on, in its .modinfo section.
func moduleDeps(path string) ([]string, error) {
	b, err := readModule(path)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("read kernel module %s: %w", path, err)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("read kernel module %s: it has no .modinfo section", path)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read kernel module %s: %w", path, err)
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		value, ok := strings.CutPrefix(string(field), "depends=")
		if !ok || value == "" {
			continue
		}
		return strings.Split(strings.ReplaceAll(value, "-", "_"), ","), nil
	}
	return nil, nil
}

// readModule returns a module's ELF bytes, unpacked if need be. Boot's own
// modules go into the initramfs unpacked, whatever the kernel can unpack.
func readModule(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read kernel module: %w", err)
	}
	var r io.Reader
	switch filepath.Ext(path) {
	case ".ko":
		return b, nil
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(b))
	case ".zst":
		r, err = zstd.NewReader(bytes.NewReader(b))
	default:
		return nil, fmt.Errorf("read kernel module %s: unknown compression", path)
	}
	if err != nil {
		return nil, fmt.Errorf("unpack kernel module %s: %w", path, err)
	}
	if b, err = io.ReadAll(r); err != nil {
		return nil, fmt.Errorf("unpack kernel module %s: %w", path, err)
	}
	return b, nil
}
