package disk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// Bounds of a disk's size, in MiB: ext4 with a journal needs the lower one,
// the API promises the upper one.
const (
	MinSizeMB = 64
	MaxSizeMB = 1 << 20
)

// Params is what Disks needs.
type Params struct {
	// BlankDir is an existing directory for the blank images.
	BlankDir string
	// Mkfs is the program that formats, mke2fs of e2fsprogs 1.46 or newer.
	// Empty: mkfs.ext4.
	Mkfs string
	Log  *slog.Logger
}

// Disks makes disks. It is safe for concurrent use.
type Disks struct {
	p Params

	mu      sync.Mutex
	flights map[int]*flight // blank images being made, by size; guarded by mu
	making  sync.WaitGroup
}

// flight is one blank image being made, for all who wait for it.
type flight struct {
	done chan struct{}
	err  error // set before done is closed
}

// New returns Disks without touching anything.
func New(p Params) *Disks {
	if p.Mkfs == "" {
		p.Mkfs = "mkfs.ext4"
	}
	return &Disks{p: p, flights: map[int]*flight{}}
}

// Create makes a disk of sizeMB MiB at path: a sparse file with an empty ext4
// file system. A file that is there already is fault.Exists and stays as it
// is; a full disk is fault.Exhausted. On error nothing is left at path.
//
// The disk outlives a crash of the host only after Sync. They are apart
// because a sync takes many times as long as the rest, and a guest can boot
// meanwhile.
func (d *Disks) Create(ctx context.Context, path string, sizeMB int) error {
	if sizeMB < MinSizeMB || sizeMB > MaxSizeMB {
		return fault.BadField("disk_size_mb", "must be between %d and %d", MinSizeMB, MaxSizeMB)
	}
	blank, err := d.blank(ctx, sizeMB)
	if err != nil {
		return fmt.Errorf("create disk: %w", err)
	}
	defer blank.Close()
	if err := cloneFile(ctx, blank, path); err != nil {
		return fmt.Errorf("create disk: %w", err)
	}
	return nil
}

// Clone makes dst a copy of the disk image src: sharing blocks where the file
// system can, else with all holes kept. Nobody may write to src meanwhile.
// Errors are those of Create.
func (d *Disks) Clone(ctx context.Context, src, dst string) error {
	f, err := os.OpenFile(src, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("clone disk: %w", err)
	}
	defer f.Close()
	if err := cloneFile(ctx, f, dst); err != nil {
		return fmt.Errorf("clone disk: %w", err)
	}
	return nil
}

// Remove removes the disk at path. One that is not there is no error.
func (d *Disks) Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove disk: %w", err)
	}
	return nil
}

// Sync makes the disk at path, and its name, durable: a host that crashes
// later finds the whole file system, not one with parts torn out.
func (d *Disks) Sync(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("sync disk: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync disk: %w", fault.DiskFull(err))
	}
	return syncDir(filepath.Dir(path))
}

// Close waits for blank images in the making.
func (d *Disks) Close() { d.making.Wait() }

// Allocated returns how many bytes the host has given to the disk at path.
func (*Disks) Allocated(path string) (int64, error) { return Allocated(path) }

// Allocated returns how many bytes the host has given to the file at path.
// Blocks shared with other files count in full.
func Allocated(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, fmt.Errorf("look at disk: %w", &os.PathError{Op: "lstat", Path: path, Err: err})
	}
	return st.Blocks * 512, nil // st_blocks counts 512-byte units, see stat(2)
}

// cloneFile makes dst a new file with the content of src.
func cloneFile(ctx context.Context, src *os.File, dst string) error {
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", src.Name())
	}
	f, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fault.New(fault.Exists, "%s exists", dst)
	}
	if err != nil {
		return fault.DiskFull(err)
	}
	err = errors.Join(fill(ctx, f, src, info.Size()), f.Close())
	if err != nil {
		return fault.DiskFull(errors.Join(err, os.Remove(dst)))
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
