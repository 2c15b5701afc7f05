package ports

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/delay"
)

// listenTime is how long a daemon may take from making its socket to listening
// on it; within it the socket is tried again and again.
const listenTime = 2 * time.Second

// awaitSocket returns when the daemon's socket takes connections. It asks once,
// and then whenever the socket's directory changes.
func (d *Docker) awaitSocket(ctx context.Context, to *Sink) error {
	if d.connects(ctx) {
		return nil
	}
	to.Settle() // nobody there, nothing published that we could learn of
	watch, err := watchDir(filepath.Dir(d.socket), filepath.Base(d.socket))
	if err != nil {
		return err
	}
	defer watch.Close()
	defer context.AfterFunc(ctx, func() { watch.Close() })()
	for { // what happened before the watch is seen here
		if d.connectsSoon(ctx) {
			return nil
		}
		if err := watch.next(); err != nil {
			return err
		}
	}
}

// connects reports whether somebody listens on the socket.
func (d *Docker) connects(ctx context.Context) bool {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", d.socket)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

// connectsSoon is connects for a socket that may have been made just now.
func (d *Docker) connectsSoon(ctx context.Context) bool {
	wait := 5 * time.Millisecond
	for began := time.Now(); ; wait *= 2 {
		if d.connects(ctx) {
			return true
		}
		fi, err := os.Lstat(d.socket)
		if err != nil || time.Since(fi.ModTime()) > listenTime || time.Since(began) > listenTime {
			return false
		}
		if delay.For(ctx, wait) != nil {
			return false
		}
	}
}

// dirWatch tells when a name in a directory appears or changes.
type dirWatch struct {
	file *os.File
	name string
}

func watchDir(dir, name string) (*dirWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	const mask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_ATTRIB | unix.IN_ONLYDIR
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		return nil, errors.Join(fmt.Errorf("watch %s: %w", dir, err), unix.Close(fd))
	}
	return &dirWatch{file: os.NewFile(uintptr(fd), "inotify"), name: name}, nil
}

// Close ends the watch and a next that waits.
func (w *dirWatch) Close() error { return w.file.Close() }

// next waits for a change of the name.
func (w *dirWatch) next() error {
	buf := make([]byte, 4096)
	for {
		n, err := w.file.Read(buf)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if w.mentions(buf[:n]) {
			return nil
		}
	}
}

// mentions reports whether one of the records in b is about the name, or says
// that some were lost.
func (w *dirWatch) mentions(b []byte) bool {
	for len(b) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(b[4:])
		length := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if length > len(b) {
			return true
		}
		name := unix.ByteSliceToString(b[:length])
		b = b[length:]
		if name == w.name || mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
	}
	return false
}
