package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// View is all that a program sees of the host's files: the system's programs
// and libraries, itself in /proc, and one directory that was opened before.
type View struct {
	// Tree is what Detach returned. The caller closes it after Start.
	Tree *os.File
	// At is where the program sees it: one name below "/".
	At string
	// Settings are all that it reads in /proc/sys, by path below that.
	Settings map[string]string
}

// Detach returns the filesystem that dir, an open directory, is on, from dir
// down, as a mount that is nowhere yet: whatever becomes of its path, a View
// shows this directory. What is mounted below it is left out. Nothing in it is a
// device or a way to other rights.
func Detach(dir *os.File, readOnly bool) (*os.File, error) {
	fd, err := unix.OpenTree(int(dir.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("take directory %s: %w", dir.Name(), err)
	}
	tree := os.NewFile(uintptr(fd), dir.Name())
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return nil, errors.Join(fmt.Errorf("take directory %s: %w", dir.Name(), err), tree.Close())
	}
	return tree, nil
}

// show makes the view all that the calling thread, which has mounts of its own,
// sees. It stays writable only where the tree is.
func (v View) show() error {
	// A directory that is always there, and that nothing below needs.
	const stage = "/sys"
	if filepath.Base(v.At) != v.At || v.At == "" || v.At == "." {
		return fmt.Errorf("make a view: %q is no name", v.At)
	}
	if err := unix.Mount("view", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=64k,mode=0755"); err != nil {
		return fmt.Errorf("make a view: %w", err)
	}
	for _, part := range []func(string) error{showSystem, showProcesses, v.showSettings, v.showTree, enter} {
		if err := part(stage); err != nil {
			return fmt.Errorf("make a view: %w", err)
		}
	}
	return nil
}

// showSystem shows programs and libraries.
func showSystem(root string) error {
	for _, name := range []string{"usr", "lib", "lib64", "bin", "sbin"} {
		from, to := "/"+name, filepath.Join(root, name)
		target, err := os.Readlink(from)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err == nil:
			if err := os.Symlink(target, to); err != nil {
				return err
			}
			continue
		case !errors.Is(err, syscall.EINVAL): // EINVAL: it is no link
			return err
		}
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "bind", Path: from, Err: err}
		}
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
		if err := unix.MountSetattr(-1, to, 0, &attr); err != nil {
			return &os.PathError{Op: "protect", Path: from, Err: err}
		}
	}
	return nil
}

// showProcesses shows a program no process but itself.
func showProcesses(root string) error {
	to := filepath.Join(root, "proc")
	if err := os.Mkdir(to, 0o555); err != nil {
		return err
	}
	err := unix.Mount("proc", to, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=ptraceable")
	if err != nil {
		return &os.PathError{Op: "mount", Path: "/proc", Err: err}
	}
	return nil
}

// showSettings covers those of the kernel.
func (v View) showSettings(root string) error {
	dir := filepath.Join(root, "proc/sys")
	if err := unix.Mount("settings", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=64k,mode=0755"); err != nil {
		return &os.PathError{Op: "cover", Path: "/proc/sys", Err: err}
	}
	for name, value := range v.Settings {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o444); err != nil {
			return err
		}
	}
	return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

func (v View) showTree(root string) error {
	to := filepath.Join(root, v.At)
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	if err := unix.MoveMount(int(v.Tree.Fd()), "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "mount", Path: v.Tree.Name(), Err: err}
	}
	return nil
}

// enter makes root "/", and lets go of everything else.
func enter(root string) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(-1, root, 0, &attr); err != nil {
		return &os.PathError{Op: "protect", Path: root, Err: err}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return &os.PathError{Op: "make the root", Path: root, Err: err}
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "leave", Path: "the host's root", Err: err}
	}
	return unix.Chdir("/")
}

// Owners are the ids that a program sees as 0 and up, in a user namespace of
// its own where it is root and in which it has every capability: over files and
// processes of these ids, and over nothing else of the host.
type Owners struct {
	// GID is the group of the host that is 0 there; Cell.UID is the user.
	GID int
	// Base is the host's id that is 1 there; 2 is the next one, up to 65534.
	Base int
}

// MappedIDs is how many ids there are from Base on.
const MappedIDs = 65534

// ids is the map of users or groups whose 0 is first.
func (o Owners) ids(first int) []syscall.SysProcIDMap {
	return []syscall.SysProcIDMap{
		{ContainerID: 0, HostID: first, Size: 1},
		{ContainerID: 1, HostID: o.Base, Size: MappedIDs},
	}
}
