package files

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// ChangeKind is what happened to a name.
type ChangeKind uint8

// The kinds of changes. A move is Renamed at the old name, then Created at the
// new one.
const (
	Created ChangeKind = iota
	Written
	Removed
	Renamed
	Chmodded
)

// Change is one thing that happened in a watched directory.
type Change struct {
	// Name is relative to the watched directory; "." is the directory itself.
	Name string
	Kind ChangeKind
	// Entry describes it, when asked for and still there.
	Entry *Entry
}

// WatchSpec says what to watch.
type WatchSpec struct {
	Path      string
	Recursive bool
	// Entries asks for Change.Entry.
	Entries bool
	// NetworkMounts allows directories on filesystems of other machines, whose
	// changes made elsewhere are not seen.
	NetworkMounts bool
}

// Watch follows the changes in a directory. Next is for one goroutine; Close
// may come from any.
type Watch struct {
	view    View
	path    string
	entries bool
	notify  *notifier
	pending []Change
	failed  error
}

// Watch begins to watch a directory. What happens after it returned is seen.
// With Recursive, new subdirectories are watched as they come, and what is in
// them by then is told as created; subdirectories that the user can't read are
// passed over.
func (v View) Watch(spec WatchSpec) (*Watch, error) {
	abs, err := v.resolve("path", spec.Path, true)
	if err != nil {
		return nil, err
	}
	err = v.do(abs, func() error {
		info, err := os.Stat(abs)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return unix.ENOTDIR
		}
		if !spec.NetworkMounts && onNetwork(abs) {
			return fault.New(fault.Precondition, "path %s is on a network filesystem, where changes made elsewhere are not seen: set allow_network_mounts to watch it anyway", quote(abs))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	n, err := newNotifier(v, abs, spec.Recursive)
	if err != nil {
		return nil, err
	}
	return &Watch{view: v, path: abs, entries: spec.Entries, notify: n}, nil
}

// onNetwork knows filesystems by the numbers of linux/magic.h and of their
// sources.
func onNetwork(path string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.V9FS_MAGIC,
		unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC, unix.NCP_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return true
	}
	return false
}

// Next returns the next change, waiting for it. When none comes for idle it
// returns false; 0 waits without limit. It fails when ctx ends, after Close,
// when changes were lost (Exhausted), and when the directory is gone
// (NotFound); the watch is over then.
func (w *Watch) Next(ctx context.Context, idle time.Duration) (Change, bool, error) {
	var deadline time.Time
	if idle > 0 {
		deadline = time.Now().Add(idle)
	}
	for len(w.pending) == 0 {
		if w.failed != nil {
			return Change{}, false, w.failed
		}
		if err := ctx.Err(); err != nil {
			return Change{}, false, context.Cause(ctx)
		}
		changes, err := w.read(ctx, deadline)
		w.pending = changes
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if ctx.Err() == nil {
				return Change{}, false, nil
			}
		case errors.Is(err, os.ErrClosed):
			w.failed = fault.New(fault.Canceled, "watch closed")
		default:
			w.failed = err
		}
	}
	c := w.pending[0]
	w.pending = w.pending[1:]
	if w.entries {
		if e, err := w.view.entry(filepath.Join(w.path, c.Name)); err == nil {
			c.Entry = &e
		}
	}
	return c, true, nil
}

// read is cut short when ctx ends.
func (w *Watch) read(ctx context.Context, deadline time.Time) ([]Change, error) {
	if err := w.notify.file.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_ = w.notify.file.SetReadDeadline(time.Unix(1, 0))
	})
	changes, err := w.notify.read()
	if !stop() {
		<-woken
	}
	return changes, err
}

// Close ends the watch; a Next that waits fails.
func (w *Watch) Close() { w.notify.close() }
