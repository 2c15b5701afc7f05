package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// FindPort returns the device of the virtio-serial port called name. It looks
// at udev's link first, and into /sys for guests without udev. The error is
// fs.ErrNotExist when there is no such port (yet).
func FindPort(name string) (string, error) {
	return findPort("/", name)
}

func findPort(root, name string) (string, error) {
	if name == "" || strings.Contains(name, "/") {
		return "", fmt.Errorf("find virtio port %q: bad name", name)
	}
	byName := filepath.Join(root, "dev/virtio-ports", name)
	if _, err := os.Stat(byName); err == nil {
		return byName, nil
	}
	files, err := filepath.Glob(filepath.Join(root, "sys/class/virtio-ports/*/name"))
	if err != nil {
		return "", fmt.Errorf("find virtio port %q: %w", name, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Join(root, "dev", filepath.Base(filepath.Dir(f))), nil
		}
	}
	return "", fmt.Errorf("find virtio port %q: %w", name, os.ErrNotExist)
}

// OpenPort opens the port called PortName. Only one process can have it open;
// a second gets EBUSY.
func OpenPort(_ context.Context) (io.ReadWriteCloser, error) {
	dev, err := FindPort(PortName)
	if err != nil {
		return nil, err
	}
	return openPort(dev)
}

func openPort(dev string) (*Port, error) {
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dev, Err: err}
	}
	f := os.NewFile(uintptr(fd), dev)
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open %s: %w", dev, err)
	}
	return &Port{f: f, rc: rc}, nil
}

// Port is an open virtio-serial port. Reads and writes wait in the runtime's
// poller, which asks the kernel for changes only (edges), so a port whose host
// is away costs nothing: the driver reports a hang-up for as long as that lasts,
// but wakes pollers only when the host comes or goes.
type Port struct {
	f    *os.File
	rc   syscall.RawConn
	away bool // the last read said so; used by the one reader
}

// Read reads from the host. When the host is away, it returns io.EOF once, and
// from then on waits for the host to come back. One goroutine may read.
func (p *Port) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	var n int
	var rerr error
	err := p.rc.Read(func(fd uintptr) bool {
		for {
			n, rerr = unix.Read(int(fd), b)
			if !errors.Is(rerr, unix.EINTR) {
				break
			}
		}
		if errors.Is(rerr, unix.EAGAIN) {
			p.away = false
			return false
		}
		// A read of nothing means that no host is connected.
		return n != 0 || rerr != nil || !p.away
	})
	switch {
	case err != nil:
		return 0, fmt.Errorf("read %s: %w", p.f.Name(), err)
	case rerr != nil:
		return 0, fmt.Errorf("read %s: %w", p.f.Name(), rerr)
	case n == 0:
		p.away = true
		return 0, io.EOF
	}
	p.away = false
	return n, nil
}

// Write writes to the host, and waits for it while it is away.
func (p *Port) Write(b []byte) (int, error) { return p.f.Write(b) }

// Close closes the port and ends reads and writes that wait.
func (p *Port) Close() error { return p.f.Close() }
