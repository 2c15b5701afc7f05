package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"

	"golang.org/x/sys/unix"
)

// loadModules loads what the kernel pack put into the initramfs, in the order
// of the file names. A module that is loaded already, or that finds no device,
// is no error.
func loadModules() error {
	files, err := filepath.Glob(modulesDir + "/*.ko*")
	if err != nil {
		return fmt.Errorf("list modules: %w", err)
	}
	sort.Strings(files)
	for _, f := range files {
		if err := loadModule(f); err != nil {
			return err
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if filepath.Ext(path) != ".ko" {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
		return &os.PathError{Op: "load module", Path: path, Err: err}
	}
	return nil
}
