package quiesce

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// writeNote keeps the names of what is frozen, each ended by a NUL byte, by a
// rename.
func writeNote(file string, names []string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("note what is frozen: %w", err)
	}
	var b strings.Builder
	for _, n := range names {
		b.WriteString(n + "\x00")
	}
	if err := os.WriteFile(file+".new", []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("note what is frozen: %w", err)
	}
	return os.Rename(file+".new", file)
}

// readNote returns the names, and whether there is a note.
func readNote(file string) ([]string, bool, error) {
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("read what is frozen: %w", err)
	}
	names := strings.Split(string(b), "\x00")
	return names[:len(names)-1], true, nil
}

func removeNote(file string) error {
	if err := unix.Unlink(file); err != nil && err != unix.ENOENT {
		return fmt.Errorf("forget what was frozen: %w", err)
	}
	return nil
}
