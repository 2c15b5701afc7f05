package proc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// LogFD is the number that the read end of the log pipe has in a child.
const LogFD = 3

// FirstFD is the number that the first of Params.Files has in a child.
const FirstFD = LogFD + 1

// noFollow refuses a symbolic link as the last part of a path.
const noFollow = unix.O_NOFOLLOW

// drainMax bounds what is read of the log after the child's end: no more than
// the largest pipe holds can be its own.
const drainMax = 1 << 20

// logBytesPerSecond is how fast a log is read at the most.
const logBytesPerSecond = 1 << 20

// logPipe is the pipe as its maker holds it: both ends as the child gets them,
// and ours to read.
type logPipe struct {
	childRead, childWrite *os.File
	read                  *os.File
}

func newLogPipe() (*logPipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make log pipe: %w", err)
	}
	// Only the write end must not block; the read end is there to be held.
	if err := unix.SetNonblock(fds[1], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, fmt.Errorf("make log pipe: %w", err)
	}
	read, err := reopenPipe("/proc/self/fd/" + strconv.Itoa(fds[0]))
	if err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, err
	}
	return &logPipe{
		childRead:  os.NewFile(uintptr(fds[0]), "log pipe"),
		childWrite: os.NewFile(uintptr(fds[1]), "log pipe"),
		read:       read,
	}, nil
}

// closeChild closes the child's ends here.
func (p *logPipe) closeChild() {
	p.childRead.Close()
	p.childWrite.Close()
}

// reopenPipe opens the read end of the pipe at a /proc/.../fd path with a file
// description of its own, that does not block. Anything but a pipe is refused
// before it is opened, since the process that holds it may be hostile.
func reopenPipe(path string) (*os.File, error) {
	probe, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log pipe: %w", err)
	}
	defer unix.Close(probe)
	var st unix.Stat_t
	if err := unix.Fstat(probe, &st); err != nil {
		return nil, fmt.Errorf("open log pipe: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, errors.New("open log pipe: it is no pipe")
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(probe), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open log pipe: %w", err)
	}
	return os.NewFile(uintptr(fd), "log pipe"), nil
}

// drain reads what is in the pipe now, without waiting.
func drain(f *os.File, to io.Writer) {
	conn, err := f.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 32<<10)
	for left := drainMax; left > 0; {
		n := 0
		err := conn.Control(func(fd uintptr) {
			for {
				n, err = unix.Read(int(fd), buf)
				if err != unix.EINTR {
					return
				}
			}
		})
		if err != nil || n <= 0 {
			return
		}
		to.Write(buf[:n]) // a log takes every byte
		left -= n
	}
}
