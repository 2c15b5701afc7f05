package identity

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// bootIDPath is where the kernel tells the id of this boot. It never changes
	// it.
	bootIDPath = "/proc/sys/kernel/random/boot_id"
	// bootIDFile holds another one, on a tmpfs that only root may enter.
	bootIDFile = "/run/hutch/boot_id"
)

// SetBootID implements Kernel by a file that is mounted over the kernel's.
// Programs with a /proc of their own, as containers have, still see the
// kernel's.
func (s *system) SetBootID(id string) error {
	if s.covered {
		return writeBootID(bootIDFile, id)
	}
	err := coverBootID(bootIDFile, bootIDPath, id)
	s.covered = err == nil
	return err
}

// writeBootID writes id to file in its place: all ids have the same length.
func writeBootID(file, id string) error {
	fd, err := unix.Open(file, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return fmt.Errorf("set boot id: open %s: %w", file, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Pwrite(fd, []byte(id+"\n"), 0); err != nil {
		return fmt.Errorf("set boot id: write %s: %w", file, err)
	}
	return nil
}

// coverBootID writes id to file and mounts it over path, unless it is there
// already: the mount is read-only, the file behind it is not.
func coverBootID(file, path, id string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("set boot id: %w", err)
	}
	if err := writeBootID(file, id); err != nil {
		return err
	}
	ours, err := os.Stat(file)
	if err != nil {
		return fmt.Errorf("set boot id: %w", err)
	}
	if shown, err := os.Stat(path); err == nil && os.SameFile(ours, shown) {
		return nil
	}
	if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("set boot id: mount over %s: %w", path, err)
	}
	const readOnly = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", path, "", readOnly, ""); err != nil {
		return fmt.Errorf("set boot id: make the mount over %s read-only: %w", path, err)
	}
	return nil
}
