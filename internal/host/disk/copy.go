package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copyChunk bounds one copy call, in bytes, so that a cancelled context is
// seen soon.
const copyChunk = 64 << 20

// fill gives the empty file dst the content of src, size bytes.
func fill(ctx context.Context, dst, src *os.File, size int64) error {
	err := retryEINTR(func() error { return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) })
	switch {
	case err == nil:
		return nil
	case !noReflink(err):
		return fmt.Errorf("reflink: %w", err)
	}
	return copySparse(ctx, dst, src, size)
}

// noReflink reports whether err says that these files can't share blocks,
// rather than that something went wrong. See ioctl_ficlonerange(2).
func noReflink(err error) bool {
	for _, e := range []error{unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.ENOSYS, unix.EPERM, unix.EBADF} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// copySparse copies the data of src and leaves its holes holes.
func copySparse(ctx context.Context, dst, src *os.File, size int64) error {
	if err := dst.Truncate(size); err != nil {
		return fmt.Errorf("set size: %w", err)
	}
	for at := int64(0); at < size; {
		start, end, err := nextData(src, at, size)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, dst, src, start, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// nextData returns the first range with data at or after at; both ends are
// size when there is none.
func nextData(f *os.File, at, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) || start >= size && err == nil {
		return size, size, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("find data: %w", err)
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, fmt.Errorf("find hole: %w", err)
	}
	return start, min(end, size), nil
}

// copyRange copies the bytes from start to end, in the kernel where it can.
func copyRange(ctx context.Context, dst, src *os.File, start, end int64) error {
	for start < end {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		in, out := start, start
		n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(min(end-start, copyChunk)), 0)
		switch {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			return copyByHand(ctx, dst, src, start, end)
		case err != nil:
			return fmt.Errorf("copy: %w", err)
		case n == 0:
			return fmt.Errorf("copy: %s ends at %d, before its size: %w", src.Name(), start, io.ErrUnexpectedEOF)
		}
		start += int64(n)
	}
	return nil
}

func copyByHand(ctx context.Context, dst, src *os.File, start, end int64) error {
	buf := make([]byte, 1<<20)
	for start < end {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		part := buf[:min(end-start, int64(len(buf)))]
		if _, err := src.ReadAt(part, start); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("copy: %w", err)
		}
		if _, err := dst.WriteAt(part, start); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		start += int64(len(part))
	}
	return nil
}

func retryEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
