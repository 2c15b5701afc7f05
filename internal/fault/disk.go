package fault

import (
	"errors"
	"syscall"
)

// DiskFull gives an error that tells of a full disk or quota of the host its
// class, and returns any other as it is.
func DiskFull(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return New(Exhausted, "the host's disk is full; free space on it: %w", err)
	}
	return err
}
