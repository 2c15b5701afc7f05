package jail

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// onOwnThread runs fn on a thread that nothing else ever runs on, and that
// ends with fn.
func onOwnThread(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked but for the main thread: that ends the thread.
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			result <- fn()
			return
		}
		// The main thread cannot end, and /proc/self shows its attributes for
		// the whole process. While it is held here, fn gets another one.
		result <- onOwnThread(fn)
		runtime.UnlockOSThread()
	}()
	return <-result
}

// confineThread takes from the calling thread what its child must not have.
// Order matters: every step needs what a later one takes away.
func confineThread(netns *os.File, c Cell) error {
	flags := unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if netns == nil {
		flags |= unix.CLONE_NEWNET
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if netns != nil {
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", netns.Name(), err)
		}
	}
	// What the host unmounts later goes here too, so that this namespace keeps
	// nothing busy; what is mounted here never shows on the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cut off mounts: %w", err)
	}
	last, err := lastCapability()
	if err != nil {
		return err
	}
	if err := c.narrow(); err != nil {
		return err
	}
	unix.Umask(0o077)
	if err := dropCapabilities(last); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	return nil
}

// narrow leaves the calling thread of the host's files what the cell may see.
func (c Cell) narrow() error {
	if c.View != nil {
		return c.View.show()
	}
	for _, d := range c.Devices {
		if err := giveDevice(d, c.UID); err != nil {
			return err
		}
	}
	if err := freeze(); err != nil {
		return err
	}
	return hideDirs(c.Hide)
}

// freeze makes all that is mounted read-only and takes the effect of set-uid
// bits, so that the program writes only what it was given open. Devices can
// still be opened for writing.
func freeze() error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(-1, "/", unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("make the view read-only (Linux 5.12 or newer is needed): %w", err)
	}
	return nil
}

// hideDirs mounts an empty directory over each.
func hideDirs(dirs []string) error {
	for _, d := range dirs {
		err := unix.Mount("hidden", d, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=4k,mode=0555")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("hide %s: %w", d, err)
		}
	}
	return nil
}

// giveDevice puts a node of the same device in place of the node at path, that
// only uid may open.
func giveDevice(path string, uid int) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("give device %s: %w", path, err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFCHR && kind != unix.S_IFBLK {
		return fmt.Errorf("give device %s: it is none", path)
	}
	// A filesystem that is only there while its one node is bound elsewhere; no
	// device is below /sys.
	const stage = "/sys"
	const node = stage + "/device"
	if err := unix.Mount("device", stage, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=4k,mode=0700"); err != nil {
		return fmt.Errorf("give device %s: %w", path, err)
	}
	err := unix.Mknod(node, kind|0o600, int(st.Rdev))
	if err == nil {
		err = unix.Chown(node, uid, uid)
	}
	if err == nil {
		err = unix.Mount(node, path, "", unix.MS_BIND, "")
	}
	if err = errors.Join(err, unix.Unmount(stage, unix.MNT_DETACH)); err != nil {
		return fmt.Errorf("give device %s: %w", path, err)
	}
	return nil
}

// lastCapability is the highest one that this kernel knows.
func lastCapability() (int, error) {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, fmt.Errorf("drop capabilities: %w", err)
	}
	last, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("drop capabilities: %w", err)
	}
	return last, nil
}

// dropCapabilities empties the bounding and ambient sets. The child loses the
// permitted set with its user id, or has one that counts in its own user
// namespace only.
func dropCapabilities(last int) error {
	for c := range last + 1 {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	return nil
}

// becomeThread changes the user and group of the calling thread alone, for
// good. The wrappers of the standard library change all threads.
func becomeThread(id int) error {
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id), uintptr(id), uintptr(id)); e != 0 {
		return fmt.Errorf("become group %d: %w", id, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id), uintptr(id), uintptr(id)); e != 0 {
		return fmt.Errorf("become user %d: %w", id, e)
	}
	return nil
}
