package kernel

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// WriteInitrd writes an initramfs: a program as /init, the module files in load
// order as /modules/<number>-<name>.ko, empty directories to mount on, and the
// console node without which init's output is lost.
func WriteInitrd(w io.Writer, program string, modules []string) error {
	f, err := os.Open(program)
	if err != nil {
		return fmt.Errorf("open the initramfs's init: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open the initramfs's init: %w", err)
	}
	c := &cpioWriter{w: w}
	for _, dir := range []string{"dev", "proc", "sys", "run", "modules", "image", "data", "newroot"} {
		c.add(cpioEntry{Name: dir, Mode: unix.S_IFDIR | 0o755})
	}
	c.add(cpioEntry{Name: "dev/console", Mode: unix.S_IFCHR | 0o600, Major: 5, Minor: 1})
	c.add(cpioEntry{Name: "init", Mode: unix.S_IFREG | 0o755, Size: fi.Size(), Body: f})
	for i, path := range modules {
		b, err := readModule(path)
		if err != nil {
			return err
		}
		c.add(cpioEntry{
			Name: fmt.Sprintf("modules/%02d-%s.ko", i, strings.ReplaceAll(moduleName(path), "_", "-")),
			Mode: unix.S_IFREG | 0o644, Size: int64(len(b)), Body: bytes.NewReader(b),
		})
	}
	return c.close()
}
