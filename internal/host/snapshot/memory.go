package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// seals make a memory file one that nobody can change, its owner included.
const seals = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL

// NewMemory returns an empty memory file of size bytes, in RAM and without a
// name. It is open to any user that is handed it, since a VMM has one of its
// own and opens it again.
func NewMemory(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := errors.Join(f.Chmod(0o666), f.Truncate(size)); err != nil {
		return nil, errors.Join(fmt.Errorf("make memory file: %w", err), f.Close())
	}
	return f, nil
}

// Seal makes a memory file unchangeable for good.
func Seal(f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal memory file: %w", err)
	}
	return nil
}

// LoadMemory reads the memory into RAM, and compares every byte with the
// digest on the way. Close the file when no VM is to be started from it any
// more; those that have it keep it.
func (s *Snapshot) LoadMemory(ctx context.Context) (*os.File, error) {
	mem, err := NewMemory("hutch-"+s.ID, s.Memory.Size)
	if err != nil {
		return nil, err
	}
	if err := s.copyPart(ctx, memoryFile, s.Memory, mem); err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return mem, nil
}
