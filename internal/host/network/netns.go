package network

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const ownNetns = "/proc/thread-self/ns/net"

// nsfsMagic is the filesystem type of namespace files: NSFS_MAGIC in
// linux/magic.h.
const nsfsMagic = 0x6e736673

// maxMounts bounds the mounts that may lie over one namespace file.
const maxMounts = 8

// namespace is an open network namespace.
type namespace struct {
	file *os.File
}

func openNamespace(path string) (*namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		f.Close()
		return nil, fmt.Errorf("look at network namespace %s: %w", path, err)
	}
	if int64(fs.Type) != nsfsMagic {
		f.Close()
		return nil, fmt.Errorf("%s is no network namespace: %w", path, os.ErrNotExist)
	}
	return &namespace{f}, nil
}

func (n *namespace) close() error { return n.file.Close() }

// do runs fn on a thread that is inside of n. A thread that cannot be brought
// home again is never reused: it ends with its goroutine.
func (n *namespace) do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.file.Name(), err)
		}
		return fn()
	})
}

// onThread runs fn, which may change the thread's network namespace, on a
// thread of its own and brings the thread home after it.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open(ownNetns)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open the thread's own network namespace: %w", err)
			return
		}
		defer home.Close()
		err = fn()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// makeNamespace makes a network namespace, kept alive by a mount on path, and
// runs fn inside of it.
func makeNamespace(path string, fn func() error) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make file for network namespace: %w", err)
	}
	f.Close()
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if err := unix.Mount(ownNetns, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount network namespace on %s: %w", path, err)
		}
		return fn()
	})
}

// removeNamespace takes away what makeNamespace left on path, all of it or
// any part.
func removeNamespace(path string) error {
	for range maxMounts {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove file of network namespace: %w", err)
	}
	return nil
}
