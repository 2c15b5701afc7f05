package ram

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	sizeSeals     = unix.F_SEAL_GROW | unix.F_SEAL_SHRINK
	templateSeals = sizeSeals | unix.F_SEAL_WRITE
)

// New returns memory of size bytes, all zero, for a VMM that runs as uid.
func New(size int64, uid int) (*os.File, error) {
	fd, err := unix.MemfdCreate("hutch-ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "hutch-ram")
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("make memory: %w", err), f.Close())
	}
	if err := Own(f, size, uid); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Own makes f, a memory file of size bytes, the own memory of a VMM that runs
// as uid: no other user may open it, and its size is for good.
func Own(f *os.File, size int64, uid int) error {
	have, err := seals(f, size)
	if err != nil {
		return err
	}
	if have&unix.F_SEAL_WRITE != 0 {
		return errors.New("take over memory: it is sealed against writing")
	}
	if err := errors.Join(f.Chown(uid, uid), f.Chmod(0o600)); err != nil {
		return fmt.Errorf("take over memory: %w", err)
	}
	if have&sizeSeals == sizeSeals {
		return nil
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, sizeSeals); err != nil {
		return fmt.Errorf("take over memory: seal its size: %w", err)
	}
	return nil
}

// CheckTemplate says why f, of size bytes, cannot be mapped by VMMs of any user
// without any of them changing it. A VMM opens it for writing all the same.
func CheckTemplate(f *os.File, size int64) error {
	have, err := seals(f, size)
	if err != nil {
		return err
	}
	if have&templateSeals != templateSeals {
		return errors.New("share memory: it is not sealed against writing, growing and shrinking")
	}
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("share memory: %w", err)
	}
	if fi.Mode().Perm()&0o006 != 0o006 {
		return fmt.Errorf("share memory: a VMM may not open a file of mode %#o: make it 0666, its seals protect it", fi.Mode().Perm())
	}
	return nil
}

// seals returns the seals of a memory file, and an error for any file that is
// none or has another size.
func seals(f *os.File, size int64) (int, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("look at memory: %w", err)
	}
	have, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return 0, fmt.Errorf("look at memory: not a memory file: %w", err)
	}
	if fi.Size() != size {
		return 0, fmt.Errorf("look at memory: it has %d bytes, the machine %d", fi.Size(), size)
	}
	return have, nil
}
