// Package modules loads kernel modules from the modules disk when something
// first needs them.
//
// It owns the way from a module's name to the kernel, by the index that the
// disk carries (modules.dep, modules.builtin), so that an image needs no tools
// for it. It never unloads one. Boot's own modules are in the initramfs and are
// package boot's. Tested with made-up indexes, and by the VM tests of what needs
// modules.
package modules

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Load loads modules with all that they need, in the given order. One that is
// loaded already, or built into the kernel, is no error. Those that can't be
// loaded are told in the error, and keep no other from it.
func Load(names ...string) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	missing := slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		_, err := os.Stat("/sys/module/" + normal(name))
		return err == nil
	})
	if len(missing) == 0 {
		return nil
	}
	return load(dir, missing, insert)
}

// load loads names from the tree dir, each file by insert.
func load(dir string, names []string, insert func(file string) error) error {
	x, err := readIndex(dir)
	if err != nil {
		return fmt.Errorf("load kernel modules: %w", err)
	}
	var errs []error
	done := map[string]bool{}
	for _, name := range names {
		files, err := x.files(name)
		for _, f := range files {
			if err == nil && !done[f] {
				done[f] = true
				err = insert(filepath.Join(dir, f))
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("load kernel module %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// index is what a tree of modules says of itself, by normal names.
type index struct {
	needs   map[string][]string // its file, then those that must be loaded before, last first
	builtin map[string]bool
}

func readIndex(dir string) (index, error) {
	x := index{map[string][]string{}, map[string]bool{}}
	deps, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return index{}, err
	}
	for line := range strings.Lines(string(deps)) {
		file, needs, ok := strings.Cut(line, ":")
		if ok {
			x.needs[nameOf(file)] = append([]string{file}, strings.Fields(needs)...)
		}
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return index{}, err
	}
	for _, file := range strings.Fields(string(builtin)) {
		x.builtin[nameOf(file)] = true
	}
	return x, nil
}

// errUnknown is why a module can't be loaded that the index does not have.
var errUnknown = errors.New("this kernel has no such module")

// files returns what to load for a module, in this order.
func (x index) files(name string) ([]string, error) {
	name = normal(name)
	if x.builtin[name] {
		return nil, nil
	}
	files := slices.Clone(x.needs[name])
	if len(files) == 0 {
		return nil, errUnknown
	}
	slices.Reverse(files)
	return files, nil
}

func nameOf(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return normal(name)
}

// normal is a name as the kernel writes it.
func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

// insert loads one file.
func insert(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if filepath.Ext(file) != ".ko" {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(int(f.Fd()), "", flags); err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "insert", Path: file, Err: err}
	}
	return nil
}
