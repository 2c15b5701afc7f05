package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Hibernation returns where the memory of a hibernated sandbox is. What is
// there was never used: Spend comes before that.
func (s *Store) Hibernation(id sandbox.ID) string { return filepath.Join(s.Dir(id), hibernationName) }

func (s *Store) spentMemory(id sandbox.ID) string { return s.Hibernation(id) + spentSuffix }

// Asleep tells whether a sandbox has a memory that was never used.
func (s *Store) Asleep(id sandbox.ID) bool { return exists(s.Hibernation(id)) }

// Woken tells whether a sandbox has a memory that was used.
func (s *Store) Woken(id sandbox.ID) bool { return exists(s.spentMemory(id)) }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Spend marks a sandbox's memory as used, also over a loss of power. From the
// moment that its processors run again, its disk is no longer the one that the
// memory knows: used twice, it would ruin the disk. A sandbox without a memory
// is no error.
func (s *Store) Spend(id sandbox.ID) error {
	err := os.Rename(s.Hibernation(id), s.spentMemory(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = syncDir(s.Dir(id))
	}
	if err != nil {
		return fmt.Errorf("mark memory as used: %w", err)
	}
	return nil
}

// DropMemory removes a sandbox's memory. When that fails half-way, it is marked
// as used at least, unless the error is Spend's.
func (s *Store) DropMemory(id sandbox.ID) error {
	if err := s.Spend(id); err != nil {
		return err
	}
	err := os.Rename(s.spentMemory(id), s.inTrash(memoryPrefix+string(id)))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove memory: %w", fault.DiskFull(err))
	}
	s.wake()
	return nil
}
