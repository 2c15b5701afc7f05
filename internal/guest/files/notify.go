package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

const watchMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ATTRIB |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_EXCL_UNLINK | unix.IN_ONLYDIR

// rawEvent is one record of inotify.
type rawEvent struct {
	wd     int32
	mask   uint32
	cookie uint32
	name   string
}

// notifier turns inotify's records, which know directories by number, into
// changes of paths. It keeps the watches of a whole tree up to date. It is
// used by one goroutine; close may come from any.
type notifier struct {
	view      View
	root      string
	recursive bool
	file      *os.File
	buf       []byte

	dirs map[int32]string // watch descriptor to path relative to root, "." for it
	wds  map[string]int32
	// fresh are paths that were found by reading a new directory: the record
	// of their creation may or may not follow.
	fresh map[string]struct{}
	// moved is a directory that went away; where to may be the next record.
	moved  string
	cookie uint32
	// upload is the cookie of a finished upload on its way to its name.
	upload uint32
	out    []Change
}

func newNotifier(v View, root string, recursive bool) (*notifier, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.EMFILE) {
			return nil, fault.New(fault.Exhausted, "too many watches are open in the guest")
		}
		return nil, fmt.Errorf("open a watch: %w", err)
	}
	n := &notifier{
		view: v, root: root, recursive: recursive, file: os.NewFile(uintptr(fd), "inotify"), buf: make([]byte, 64<<10),
		dirs: map[int32]string{}, wds: map[string]int32{}, fresh: map[string]struct{}{},
	}
	err = v.do(root, func() error {
		if err := n.add(".", 0); err != nil {
			return err
		}
		if !recursive {
			return nil
		}
		return n.scan(".", false, 0)
	})
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *notifier) close() { _ = n.file.Close() }

// add watches one directory. It runs with the user's rights.
func (n *notifier) add(rel string, flags uint32) error {
	rc, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var wd int
	var inner error
	if err := rc.Control(func(fd uintptr) {
		wd, inner = unix.InotifyAddWatch(int(fd), filepath.Join(n.root, rel), watchMask|flags)
	}); err != nil {
		return err
	}
	if errors.Is(inner, unix.ENOSPC) {
		return fault.New(fault.Exhausted, "the guest's limit of watched directories is reached (fs.inotify.max_user_watches): raise it, or watch a smaller tree")
	}
	if inner != nil {
		return inner
	}
	// The same directory under a new name keeps its number.
	if old, known := n.dirs[int32(wd)]; known && n.wds[old] == int32(wd) {
		delete(n.wds, old)
	}
	n.dirs[int32(wd)], n.wds[rel] = rel, int32(wd)
	return nil
}

// scan watches the directories below rel, which is watched already. With tell
// it reports all that it finds as created: the records may have come to pass
// before the watch. It runs with the user's rights.
func (n *notifier) scan(rel string, tell bool, depth int) error {
	if depth > maxDepth {
		return fault.New(fault.Invalid, "path %s is nested more than %d deep", quote(n.root), maxDepth)
	}
	entries, err := os.ReadDir(filepath.Join(n.root, rel))
	if err != nil {
		if rel != "." && gone(err) {
			return nil
		}
		return err
	}
	for _, e := range entries {
		child := filepath.Join(rel, e.Name())
		if tell {
			n.fresh[child] = struct{}{}
			n.tell(child, Created)
		}
		if !e.IsDir() {
			continue
		}
		if err := n.add(child, unix.IN_DONT_FOLLOW); err != nil {
			if gone(err) {
				continue
			}
			return err
		}
		if err := n.scan(child, tell, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (n *notifier) tell(rel string, kind ChangeKind) {
	n.out = append(n.out, Change{Name: rel, Kind: kind})
}

// read waits for records until the deadline of the file and returns what they
// mean. It returns os.ErrDeadlineExceeded, os.ErrClosed, or the error that
// ends the watch, after which nothing more comes.
func (n *notifier) read() ([]Change, error) {
	size, err := n.file.Read(n.buf)
	if err != nil {
		return nil, err
	}
	n.out = nil
	if err := n.view.user.Do(func() error { return n.digest(n.buf[:size]) }); err != nil {
		return n.out, err
	}
	if n.drained() {
		clear(n.fresh)
	}
	return n.out, nil
}

// drained reports whether no record waits.
func (n *notifier) drained() bool {
	rc, err := n.file.SyscallConn()
	if err != nil {
		return false
	}
	waiting := 1
	_ = rc.Control(func(fd uintptr) {
		if w, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ); err == nil {
			waiting = w
		}
	})
	return waiting == 0
}

func (n *notifier) digest(buf []byte) error {
	for len(buf) >= unix.SizeofInotifyEvent {
		ev := rawEvent{
			wd:     int32(binary.NativeEndian.Uint32(buf[0:])),
			mask:   binary.NativeEndian.Uint32(buf[4:]),
			cookie: binary.NativeEndian.Uint32(buf[8:]),
		}
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[12:]))
		if end > len(buf) {
			break
		}
		ev.name = strings.TrimRight(string(buf[unix.SizeofInotifyEvent:end]), "\x00")
		buf = buf[end:]
		if err := n.event(ev); err != nil {
			return err
		}
	}
	return nil
}

func (n *notifier) event(ev rawEvent) error {
	if ev.mask&unix.IN_Q_OVERFLOW != 0 {
		return fault.New(fault.Exhausted, "more changes than the kernel holds: some were lost; list the directory and watch again")
	}
	if n.moved != "" && (ev.mask&unix.IN_MOVED_TO == 0 || ev.cookie != n.cookie) {
		n.forget(n.moved) // it left the tree
		n.moved = ""
	}
	dir, known := n.dirs[ev.wd]
	if !known {
		return nil
	}
	if ev.name == "" {
		return n.self(ev, dir)
	}
	rel := filepath.Join(dir, ev.name)
	if strings.HasPrefix(ev.name, tempPrefix) && ev.mask&unix.IN_MOVED_FROM == 0 && ev.mask&unix.IN_ISDIR == 0 {
		return nil // an upload under way shows when it is complete
	}
	isDir := ev.mask&unix.IN_ISDIR != 0 && n.recursive
	_, fresh := n.fresh[rel]
	switch {
	case ev.mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return n.created(ev, rel, isDir, fresh)
	case ev.mask&unix.IN_MOVED_FROM != 0:
		delete(n.fresh, rel)
		if isDir {
			n.moved, n.cookie = rel, ev.cookie
		}
		if strings.HasPrefix(ev.name, tempPrefix) {
			n.upload = ev.cookie
			return nil
		}
		n.tell(rel, Renamed)
	case ev.mask&unix.IN_DELETE != 0:
		delete(n.fresh, rel)
		n.tell(rel, Removed)
	case ev.mask&unix.IN_MODIFY != 0:
		n.tell(rel, Written)
	case ev.mask&unix.IN_ATTRIB != 0:
		n.tell(rel, Chmodded)
	}
	return nil
}

// created reports a new name and, for a directory, watches it and reports what
// is in it already.
func (n *notifier) created(ev rawEvent, rel string, isDir, fresh bool) error {
	if fresh {
		delete(n.fresh, rel) // told before
		return nil
	}
	n.tell(rel, Created)
	if ev.mask&unix.IN_MOVED_TO != 0 && ev.cookie == n.upload {
		n.tell(rel, Written) // it may have replaced a file
	}
	if !isDir {
		return nil
	}
	if n.moved != "" {
		n.rename(n.moved, rel)
		n.moved = ""
		return nil
	}
	if err := n.add(rel, unix.IN_DONT_FOLLOW); err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	return n.scan(rel, true, 0)
}

// self handles records about a watched directory itself. Those of
// subdirectories are told by their parents.
func (n *notifier) self(ev rawEvent, dir string) error {
	if ev.mask&(unix.IN_IGNORED|unix.IN_UNMOUNT) != 0 {
		delete(n.dirs, ev.wd)
		if n.wds[dir] == ev.wd {
			delete(n.wds, dir)
		}
		if dir == "." {
			return fault.New(fault.NotFound, "path %s, which was watched, is gone", quote(n.root))
		}
		return nil
	}
	if dir != "." {
		return nil
	}
	switch {
	case ev.mask&unix.IN_DELETE_SELF != 0:
		n.tell(".", Removed)
	case ev.mask&unix.IN_MOVE_SELF != 0:
		n.tell(".", Renamed)
	case ev.mask&unix.IN_ATTRIB != 0:
		n.tell(".", Chmodded)
	}
	return nil
}

// rename gives the watches at and below old their new place.
func (n *notifier) rename(old, to string) {
	for rel, wd := range n.below(old) {
		moved := to + strings.TrimPrefix(rel, old)
		delete(n.wds, rel)
		n.wds[moved], n.dirs[wd] = wd, moved
	}
}

// forget ends the watches at and below rel.
func (n *notifier) forget(rel string) {
	rc, err := n.file.SyscallConn()
	if err != nil {
		return
	}
	for sub, wd := range n.below(rel) {
		delete(n.wds, sub)
		delete(n.dirs, wd)
		_ = rc.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
	}
}

func (n *notifier) below(rel string) map[string]int32 {
	found := map[string]int32{}
	for path, wd := range n.wds {
		if path == rel || strings.HasPrefix(path, rel+"/") {
			found[path] = wd
		}
	}
	return found
}
