package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
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
	return s.load(ctx, memoryFile, s.Memory)
}

// LoadData is LoadMemory for the data disk.
func (s *Snapshot) LoadData(ctx context.Context) (*os.File, error) {
	if s.Data == nil {
		return nil, fault.New(fault.Precondition, "snapshot %s has no data disk", s.ID)
	}
	return s.load(ctx, dataFile, *s.Data)
}

func (s *Snapshot) load(ctx context.Context, name string, want Part) (*os.File, error) {
	mem, err := NewMemory("hutch-"+s.ID, want.Size)
	if err != nil {
		return nil, err
	}
	if err := s.copyPart(ctx, name, want, mem); err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return mem, nil
}

// CopyMemory makes path, which must not exist, a copy of a memory file, with
// its holes. On error nothing is left. It outlives a crash of the host only
// once it is synced. Many may copy one file at a time.
func CopyMemory(ctx context.Context, mem *os.File, path string) error {
	f, err := create(path)
	if err != nil {
		return fmt.Errorf("copy memory file: %w", fault.DiskFull(err))
	}
	if err := errors.Join(copyData(ctx, mem, f), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("copy memory file: %w", fault.DiskFull(err)), os.Remove(path))
	}
	return nil
}

// copyData copies what src holds to dst, which is empty.
func copyData(ctx context.Context, src, dst *os.File) error {
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return err
	}
	buf := make([]byte, chunk)
	return eachExtent(src, info.Size(), func(begin, end int64) error {
		for at := begin; at < end; at += chunk {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			piece := buf[:min(chunk, end-at)]
			if _, err := src.ReadAt(piece, at); err != nil {
				return err
			}
			if _, err := dst.WriteAt(piece, at); err != nil {
				return err
			}
		}
		return nil
	})
}
