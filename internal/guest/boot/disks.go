package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// diskTimeout bounds the wait for a disk that the kernel has not found yet.
const diskTimeout = 10 * time.Second

// findDisk returns the device of the virtio disk with the given serial, or ""
// when there is none yet. sys is the root of sysfs.
func findDisk(sys, serial string) (string, error) {
	files, err := filepath.Glob(sys + "/block/vd*/serial")
	if err != nil {
		return "", fmt.Errorf("list disks: %w", err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		if strings.TrimRight(string(b), "\x00\n") == serial {
			return "/dev/" + filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", nil
}

// waitDisk waits for the disk with the given serial, woken by the kernel's
// announcements of devices.
func waitDisk(serial string) (string, error) {
	events, err := openUevents()
	if err != nil {
		return "", err
	}
	defer unix.Close(events)
	for deadline := time.Now().Add(diskTimeout); ; {
		dev, err := findDisk("/sys", serial)
		if err != nil || dev != "" {
			return dev, err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return "", fmt.Errorf("no disk with serial %q within %s", serial, diskTimeout)
		}
		if err := awaitUevent(events, left); err != nil {
			return "", err
		}
	}
}

func openUevents() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return -1, fmt.Errorf("open uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("bind uevent socket: %w", err)
	}
	return fd, nil
}

// awaitUevent returns after one announcement, or when the time is over.
func awaitUevent(fd int, limit time.Duration) error {
	tv := unix.NsecToTimeval(int64(limit))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("bound the wait for uevents: %w", err)
	}
	var buf [8192]byte
	_, _, err := unix.Recvfrom(fd, buf[:], 0)
	switch err {
	case nil, unix.EINTR, unix.EAGAIN, unix.ENOBUFS:
		return nil
	}
	return fmt.Errorf("read uevents: %w", err)
}
