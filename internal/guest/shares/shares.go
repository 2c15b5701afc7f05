// Package shares mounts directories of the host in the guest, by virtiofs.
//
// It owns the mounts and the kernel's module for them, which is loaded only
// where there is something to mount. It never decides what is shared. A shared
// directory is the host's: files in it give no rights and are no devices here.
//
// Tested with a kernel that writes down what it is told, and by VM tests.
package shares

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/modules"
)

// Type is the type of the filesystems.
const Type = "virtiofs"

// Share is one directory.
type Share struct {
	Tag      string // of its device
	Path     string // where it belongs
	ReadOnly bool
}

// Kernel is what this package asks of the kernel.
type Kernel interface {
	// LoadModule loads the driver; one that is there is no error.
	LoadModule(name string) error
	// Mounted tells whether there is such a filesystem at path.
	Mounted(tag, path string) (bool, error)
	// MakeDir makes a directory with its parents.
	MakeDir(path string) error
	Mount(tag, path string, flags uintptr) error
}

// Mount mounts all, in their order, and returns in words what did not work. What
// is mounted already stays as it is.
func Mount(k Kernel, all []Share) (problems []string) {
	if len(all) == 0 {
		return nil
	}
	if err := k.LoadModule(Type); err != nil {
		return []string{err.Error()}
	}
	for _, s := range all {
		if err := mount(k, s); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", s.Path, err))
		}
	}
	return problems
}

func mount(k Kernel, s Share) error {
	if !filepath.IsAbs(s.Path) || s.Tag == "" {
		return errors.New("a tag and an absolute path are needed")
	}
	if there, err := k.Mounted(s.Tag, s.Path); err != nil || there {
		return err
	}
	if err := k.MakeDir(s.Path); err != nil {
		return err
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if s.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	return k.Mount(s.Tag, s.Path, flags)
}

// System returns the kernel of this machine.
func System() Kernel { return system{} }

type system struct{}

func (system) LoadModule(name string) error { return modules.Load(name) }

func (system) MakeDir(path string) error { return os.MkdirAll(path, 0o755) }

func (system) Mount(tag, path string, flags uintptr) error {
	if err := unix.Mount(tag, path, Type, flags, ""); err != nil {
		return &os.PathError{Op: "mount " + Type, Path: path, Err: err}
	}
	return nil
}

func (system) Mounted(tag, path string) (bool, error) {
	raw, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return false, err
	}
	return mounted(string(raw), tag, path), nil
}

// mounted looks in the form of /proc/<pid>/mountinfo, see proc(5). It escapes
// blanks and backslashes in paths as octal numbers.
func mounted(mountinfo, tag, path string) bool {
	path = strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(path)
	for line := range strings.Lines(mountinfo) {
		head, tail, ok := strings.Cut(line, " - ")
		at, what := strings.Fields(head), strings.Fields(tail)
		if ok && len(at) > 4 && len(what) > 1 && at[4] == path && what[0] == Type && what[1] == tag {
			return true
		}
	}
	return false
}
