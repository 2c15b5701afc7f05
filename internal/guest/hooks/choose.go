package hooks

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxHooks bounds how many hooks are run.
const maxHooks = 64

// choose lists the hooks in dir, by name. What looks like a hook and is not
// trusted is told to warn.
func choose(dir string, warn func(error)) []string {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err == nil {
		err = trusted(dir)
	}
	if err != nil {
		warn(fmt.Errorf("restore hooks: %w", err))
		return nil
	}
	var hooks []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		fi, err := os.Stat(path)
		if err != nil || !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 || strings.HasPrefix(e.Name(), ".") || strings.HasSuffix(e.Name(), "~") {
			continue
		}
		if err := trusted(path); err != nil {
			warn(fmt.Errorf("restore hook %s: %w", e.Name(), err))
			continue
		}
		if hooks = append(hooks, path); len(hooks) == maxHooks {
			warn(fmt.Errorf("restore hooks: those after %s are not run: %d are the limit", e.Name(), maxHooks))
			break
		}
	}
	return hooks
}

// trusted refuses what another user than root owns or may write.
func trusted(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Uid != 0 || st.Mode&0o022 != 0 {
		return fmt.Errorf("not run: %s must belong to root, and nobody else may write it", path)
	}
	return nil
}
