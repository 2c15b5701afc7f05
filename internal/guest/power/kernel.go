package power

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kernel is what this package asks of the kernel.
type Kernel interface {
	// Own returns an error unless this program may end the machine.
	Own() error
	// Mounts lists the mounts that this process sees, oldest first.
	Mounts() ([]Mount, error)
	// Sync writes everything back to the disks.
	Sync()
	// RemountReadOnly brings the filesystem at point to rest.
	RemountReadOnly(point string) error
	// Unmount removes the topmost mount at point.
	Unmount(point string) error
	// KillAll kills every process but PID 1 and this one. It does not wait.
	KillAll() error
	// EmergencyReadOnly brings all filesystems to rest, open files or not. It
	// may return before that is done.
	EmergencyReadOnly() error
	// Trim gives the unused blocks of the filesystem of m back, and returns
	// their bytes.
	Trim(m Mount) (uint64, error)
	// Off ends the machine. It returns only when it failed.
	Off() error
}

// system is the kernel of the machine that this program runs on.
type system struct{ restart bool }

// System returns the kernel of this machine. With restart, Off restarts it:
// for VMMs on which a restart is the end, and a power-off only a halt.
//
// What hits the whole machine (KillAll, EmergencyReadOnly, Off) is refused where
// Own is: run on a host by mistake, it must not take the host down.
func System(restart bool) Kernel { return system{restart: restart} }

// Own implements Kernel: PID 1 must run this very program, as it does in a
// sandbox.
func (system) Own() error {
	first, err := os.Stat("/proc/1/exe")
	if err != nil {
		return fmt.Errorf("look at PID 1: %w", err)
	}
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("look at this program: %w", err)
	}
	if !os.SameFile(first, self) {
		return errors.New("this is not the inside of a sandbox: PID 1 is another program")
	}
	return nil
}

// KillAll implements Kernel.
func (s system) KillAll() error {
	if err := s.Own(); err != nil {
		return fmt.Errorf("kill all processes: %w", err)
	}
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill all processes: %w", err)
	}
	return nil
}

// Mounts implements Kernel.
func (system) Mounts() ([]Mount, error) {
	raw, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(raw))
}

// Sync implements Kernel.
func (system) Sync() { unix.Sync() }

// RemountReadOnly implements Kernel.
func (system) RemountReadOnly(point string) error {
	if err := unix.Mount("", point, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return &os.PathError{Op: "remount read-only", Path: point, Err: err}
	}
	return nil
}

// Unmount implements Kernel.
func (system) Unmount(point string) error {
	if err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: point, Err: err}
	}
	return nil
}

// EmergencyReadOnly implements Kernel by the magic SysRq key u.
func (s system) EmergencyReadOnly() error {
	if err := s.Own(); err != nil {
		return fmt.Errorf("emergency remount: %w", err)
	}
	return os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0)
}

// Off implements Kernel by reboot(2). The kernel does not sync by itself.
func (s system) Off() error {
	if err := s.Own(); err != nil {
		return err
	}
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if s.restart {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	if err := unix.Reboot(how); err != nil {
		return fmt.Errorf("reboot(2): %w", err)
	}
	return errors.New("reboot(2) returned")
}

// fitrim is FITRIM of linux/fs.h: _IOWR('X', 121, struct fstrim_range).
const fitrim = 0xC0185879

// trimRange is struct fstrim_range of linux/fs.h, in bytes. The kernel writes
// the bytes trimmed to length.
type trimRange struct{ start, length, minimum uint64 }

// errCovered tells that another mount hides the one that was meant.
var errCovered = errors.New("another filesystem is mounted over it")

// Trim implements Kernel by FITRIM. It can't be cancelled; the time depends on
// the number of free extents, a fraction of a second in practice.
func (system) Trim(m Mount) (uint64, error) {
	fd, err := openMount(m.Point)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: m.Point, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: m.Point, Err: err}
	}
	// The device numbers of a btrfs file and of its mount differ by design.
	if m.Type != "btrfs" && st.Dev != unix.Mkdev(m.Major, m.Minor) {
		return 0, &os.PathError{Op: "trim", Path: m.Point, Err: errCovered}
	}
	r := trimRange{length: 1<<64 - 1}
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fitrim, uintptr(unsafe.Pointer(&r)))
		switch errno {
		case 0:
			return r.length, nil
		case unix.EINTR:
			r = trimRange{length: 1<<64 - 1}
		default:
			return 0, &os.PathError{Op: "trim", Path: m.Point, Err: errno}
		}
	}
}

func openMount(point string) (int, error) {
	for {
		fd, err := unix.Open(point, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
