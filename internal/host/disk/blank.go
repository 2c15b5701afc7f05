package disk

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	// blankVersion changes whenever a newly made blank image would differ.
	blankVersion = "v1"
	blankSuffix  = "-" + blankVersion + ".img"
	tempPrefix   = ".new-"
	// maxBlanks bounds how many sizes are kept.
	maxBlanks = 64
	// makeTimeout bounds the making of one blank image.
	makeTimeout = 2 * time.Minute

	label    = "hutch-data"
	fsUUID   = "68757463-682d-4000-8000-646174610001"
	hashSeed = "68757463-682d-4000-8000-646174610002"
	// features are named in full, so that the host's mke2fs.conf has no say.
	// Without resize_inode no blocks are set aside for growing.
	features = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)

// blank opens the blank image of a size, and has it made when there is none.
// One image of a size is made at a time; a caller that gives up does not end
// the work, others may wait for it.
func (d *Disks) blank(ctx context.Context, sizeMB int) (*os.File, error) {
	path := filepath.Join(d.p.BlankDir, strconv.Itoa(sizeMB)+blankSuffix)
	if f, err := openBlank(path, sizeMB); err == nil || !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	d.mu.Lock()
	fl := d.flights[sizeMB]
	if fl == nil {
		fl = &flight{done: make(chan struct{})}
		d.flights[sizeMB] = fl
		d.making.Go(func() { d.fly(context.WithoutCancel(ctx), fl, path, sizeMB) })
	}
	d.mu.Unlock()
	select {
	case <-fl.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if fl.err != nil {
		return nil, fl.err
	}
	return openBlank(path, sizeMB)
}

func (d *Disks) fly(ctx context.Context, fl *flight, path string, sizeMB int) {
	ctx, cancel := context.WithTimeout(ctx, makeTimeout)
	defer cancel()
	fl.err = d.makeBlank(ctx, path, sizeMB)
	d.mu.Lock()
	delete(d.flights, sizeMB)
	d.mu.Unlock()
	close(fl.done)
}

// openBlank opens a blank image and checks that it is one. One that is not,
// which only a broken host leaves behind, is removed and made anew.
func openBlank(path string, sizeMB int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := checkBlank(f, sizeMB); err != nil {
		f.Close()
		if rmErr := os.Remove(path); rmErr != nil {
			return nil, fmt.Errorf("remove broken blank image: %w", errors.Join(err, rmErr))
		}
		return nil, fmt.Errorf("%w: %w", os.ErrNotExist, err)
	}
	// When it was last used, for trim. A failure only makes it go sooner.
	now := time.Now()
	_ = os.Chtimes(path, now, now)
	return f, nil
}

func checkBlank(f *os.File, sizeMB int) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() != int64(sizeMB)<<20 {
		return fmt.Errorf("blank image has mode %v and size %d", info.Mode(), info.Size())
	}
	// The superblock is at byte 1024, its magic 56 bytes into it.
	var magic [2]byte
	if _, err := f.ReadAt(magic[:], 1024+56); err != nil {
		return fmt.Errorf("read blank image: %w", err)
	}
	if binary.LittleEndian.Uint16(magic[:]) != 0xEF53 {
		return errors.New("blank image holds no ext4")
	}
	return nil
}

// makeBlank makes a blank image under a temporary name and renames it.
func (d *Disks) makeBlank(ctx context.Context, path string, sizeMB int) error {
	d.trim()
	f, err := os.CreateTemp(d.p.BlankDir, tempPrefix)
	if err != nil {
		return fmt.Errorf("make blank image: %w", fault.DiskFull(err))
	}
	err = d.format(ctx, f, int64(sizeMB)<<20)
	if err == nil {
		err = errors.Join(f.Chmod(0o400), f.Sync())
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("make blank image of %d MiB: %w", sizeMB, fault.DiskFull(errors.Join(err, os.Remove(f.Name()))))
	}
	return syncDir(d.p.BlankDir)
}

// format makes an ext4 in f, which this process has just made.
func (d *Disks) format(ctx context.Context, f *os.File, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := checkEmpty(f, size); err != nil {
		return err
	}
	journalMB := 4
	if size >= 2<<30 {
		journalMB = 16
	}
	// The file is handed over open: whatever its name means by then, no other
	// file is formatted. The discard that mke2fs does first tells it that all
	// is zero, so it marks the inode tables as cleared and no guest has to.
	cmd := exec.CommandContext(ctx, d.p.Mkfs, "-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
		"-L", label, "-U", fsUUID, "-J", "size="+strconv.Itoa(journalMB), "-O", features,
		"-E", "hash_seed="+hashSeed+",lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,discard",
		"/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "MKE2FS_CONFIG=/dev/null", "LC_ALL=C"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		// mke2fs tells of a full disk in words only.
		if strings.Contains(out.String(), unix.ENOSPC.Error()) || strings.Contains(out.String(), "No space left") {
			err = unix.ENOSPC
		}
		return fmt.Errorf("%s: %w: %s", d.p.Mkfs, err, lastLine(out.String()))
	}
	return nil
}

// checkEmpty verifies that f holds nothing: no data anywhere, and zeroes at
// both ends also where a file system does not tell holes from data.
func checkEmpty(f *os.File, size int64) error {
	if start, _, err := nextData(f, 0, size); err != nil || start < size {
		if err == nil {
			err = fmt.Errorf("it has data at %d", start)
		}
		return fmt.Errorf("refuse to format %s: %w", f.Name(), err)
	}
	buf := make([]byte, 1<<20)
	for _, at := range []int64{0, size - int64(len(buf))} {
		if _, err := f.ReadAt(buf, at); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("refuse to format %s: %w", f.Name(), err)
		}
		if len(bytes.Trim(buf, "\x00")) > 0 {
			return fmt.Errorf("refuse to format %s: it has data", f.Name())
		}
	}
	return nil
}

// trim removes blank images of other versions, what a crash left half made,
// and those used longest ago when there are too many. A clone in flight keeps
// its image open.
func (d *Disks) trim() {
	entries, err := os.ReadDir(d.p.BlankDir)
	if err != nil {
		d.p.Log.Warn("blank images can't be listed", "error", err)
		return
	}
	type blank struct {
		path string
		used time.Time
	}
	var keep []blank
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // gone meanwhile
		}
		path := filepath.Join(d.p.BlankDir, e.Name())
		switch {
		case strings.HasSuffix(e.Name(), blankSuffix):
			keep = append(keep, blank{path, info.ModTime()})
		case !strings.HasPrefix(e.Name(), tempPrefix) || time.Since(info.ModTime()) > makeTimeout:
			d.remove(path)
		}
	}
	slices.SortFunc(keep, func(a, b blank) int { return cmp.Compare(b.used.UnixNano(), a.used.UnixNano()) })
	for i := maxBlanks - 1; i < len(keep); i++ {
		d.remove(keep[i].path)
	}
}

func (d *Disks) remove(path string) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.p.Log.Warn("blank image can't be removed", "path", path, "error", err)
	}
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
