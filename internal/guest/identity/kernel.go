package identity

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// system is the kernel of the machine that this program runs on.
type system struct {
	covered bool // programs read the boot id in bootIDFile
}

// System returns the kernel of this machine. Changing it needs root.
func System() Kernel { return &system{} }

// Release implements Kernel.
func (*system) Release() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

// Hostname implements Kernel.
func (*system) Hostname() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Nodename[:]), nil
}

// SetHostname implements Kernel.
func (*system) SetHostname(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("sethostname: %w", err)
	}
	return nil
}

// AddEntropy implements Kernel by the ioctls of random(4).
func (*system) AddEntropy(seed []byte) error {
	const path = "/dev/urandom"
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	pool := poolInfo(seed)
	defer clear(pool)
	if err := ioctl(fd, unix.RNDADDENTROPY, unsafe.Pointer(&pool[0])); err != nil {
		return fmt.Errorf("RNDADDENTROPY: %w", err)
	}
	// ENODATA: the generator was never seeded, so it has nothing old to give
	// out, and takes the seed with its first use.
	if err := ioctl(fd, unix.RNDRESEEDCRNG, nil); err != nil && err != unix.ENODATA {
		return fmt.Errorf("RNDRESEEDCRNG: %w", err)
	}
	return nil
}

// poolInfo returns struct rand_pool_info of linux/random.h: the entropy in
// bits, the length in bytes, the bytes.
func poolInfo(seed []byte) []byte {
	pool := make([]byte, 8, 8+len(seed))
	binary.NativeEndian.PutUint32(pool[0:], uint32(8*len(seed)))
	binary.NativeEndian.PutUint32(pool[4:], uint32(len(seed)))
	return append(pool, seed...)
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
