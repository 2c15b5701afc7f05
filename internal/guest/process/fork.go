package process

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/account"
)

// wires are the agent's ends of a program's descriptors, and the ends for the
// program until it has them.
type wires struct {
	in      *os.File // write end of stdin, or the terminal; nil: no input
	outs    map[Stream]*os.File
	theirs  []int // 0, 1 and 2 of the program
	control *os.File
}

func (w *wires) closeTheirs() {
	for i, fd := range w.theirs {
		dup := false
		for _, before := range w.theirs[:i] {
			dup = dup || before == fd
		}
		if !dup {
			_ = unix.Close(fd)
		}
	}
	w.theirs = nil
}

func (w *wires) closeOurs() {
	if w.in != nil {
		_ = w.in.Close()
	}
	for _, f := range w.outs {
		_ = f.Close()
	}
}

// openPipes makes stdin (unless noStdin), stdout and stderr.
func openPipes(noStdin bool) (*wires, error) {
	w := &wires{outs: map[Stream]*os.File{}}
	fail := func(err error) (*wires, error) {
		w.closeTheirs()
		w.closeOurs()
		return nil, fmt.Errorf("open pipes: %w", err)
	}
	if noStdin {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fail(err)
		}
		w.theirs = append(w.theirs, fd)
	} else {
		r, f, err := pipe(1)
		if err != nil {
			return fail(err)
		}
		w.in = f
		w.theirs = append(w.theirs, r)
	}
	for _, s := range []Stream{Stdout, Stderr} {
		wr, f, err := pipe(0)
		if err != nil {
			return fail(err)
		}
		w.outs[s] = f
		w.theirs = append(w.theirs, wr)
	}
	return w, nil
}

// pipe makes a pipe whose end number ours is the agent's, and the other a
// blocking one for a program. Both are closed on exec.
func pipe(ours int) (theirs int, f *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, nil, err
	}
	if err := unix.SetNonblock(fds[ours], true); err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return -1, nil, err
	}
	return fds[1-ours], os.NewFile(uintptr(fds[ours]), "pipe"), nil
}

// openTerminal makes a pseudo terminal that belongs to the user.
func openTerminal(size Size, user account.User) (*wires, error) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	slave, err := openSlave(master, size, user)
	if err != nil {
		_ = unix.Close(master)
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	f := os.NewFile(uintptr(master), "terminal")
	return &wires{in: f, outs: map[Stream]*os.File{Terminal: f}, theirs: []int{slave, slave, slave}, control: f}, nil
}

// openSlave asks the master for its other end, which works wherever devpts is
// mounted.
func openSlave(master int, size Size, user account.User) (int, error) {
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, fmt.Errorf("unlock: %w", err)
	}
	if err := setSize(master, size); err != nil {
		return -1, err
	}
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, uintptr(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC))
	if errno != 0 {
		return -1, fmt.Errorf("get the other end: %w", errno)
	}
	slave := int(r)
	// Programs open their terminal again by name; the group stays as devpts
	// set it.
	if err := unix.Fchown(slave, int(user.UID), -1); err != nil && os.Geteuid() == 0 {
		_ = unix.Close(slave)
		return -1, fmt.Errorf("hand it to user %s: %w", user.Label(), err)
	}
	return slave, nil
}

func setSize(fd int, size Size) error {
	ws := unix.Winsize{Col: size.Cols, Row: size.Rows}
	if ws.Col == 0 {
		ws.Col = 80
	}
	if ws.Row == 0 {
		ws.Row = 24
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &ws); err != nil {
		return fmt.Errorf("set size: %w", err)
	}
	return nil
}

// child is a started program: its pid stays its own until reap.
type child struct {
	pid   int
	pidfd *os.File
}

// fork starts the program of p in group (nil: none) on the descriptors of w.
func fork(p plan, w *wires, terminal bool, gr *group) (child, error) {
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, Setctty: terminal, Ctty: 0, PidFD: &pidfd}
	if os.Geteuid() == 0 || int(p.user.UID) != os.Geteuid() {
		sys.Credential = &syscall.Credential{Uid: p.user.UID, Gid: p.user.GID, Groups: p.user.Groups}
	}
	if gr != nil {
		dir, err := unix.Open(gr.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return child{}, fmt.Errorf("open cgroup: %w", err)
		}
		defer unix.Close(dir)
		sys.UseCgroupFD, sys.CgroupFD = true, dir
	}
	attr := &syscall.ProcAttr{Dir: p.cwd, Env: p.env, Sys: sys}
	for _, fd := range w.theirs {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	pid, err := forkExec(p, attr)
	if err != nil {
		return child{}, explain(p.path, err)
	}
	c := child{pid: pid}
	if pidfd >= 0 {
		if err := unix.SetNonblock(pidfd, true); err == nil {
			c.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
			return c, nil
		}
		_ = unix.Close(pidfd)
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	_, _ = c.reap()
	return child{}, errors.New("start program: the kernel gives no pidfd; Linux 5.7 or newer is needed")
}

// ordinarySlack is Linux' own lateness of timers, in nanoseconds.
const ordinarySlack = 50_000

// forkExec starts the program with the timer slack of an ordinary process: that
// of the agent is larger, and is the calling thread's.
func forkExec(p plan, attr *syscall.ProcAttr) (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, ordinarySlack, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("set timer slack: %w", err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }() // the thread's own again
	return syscall.ForkExec(p.path, p.argv, attr)
}

// await returns true when the program has ended, and false at the deadline,
// which may be zero. It takes no thread.
func (c child) await(deadline time.Time) (bool, error) {
	if err := c.pidfd.SetReadDeadline(deadline); err != nil {
		return false, fmt.Errorf("wait for process %d: %w", c.pid, err)
	}
	rc, err := c.pidfd.SyscallConn()
	if err != nil {
		return false, fmt.Errorf("wait for process %d: %w", c.pid, err)
	}
	err = rc.Read(func(fd uintptr) bool { return readable(int(fd)) })
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return readable(int(c.fd())), nil
	}
	return err == nil, err
}

func (c child) fd() (n int) {
	_ = control(c.pidfd, func(fd int) error { n = fd; return nil })
	return n
}

func readable(fd int) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

// reap takes the exit status; the pid is free afterwards.
func (c child) reap() (unix.WaitStatus, error) {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(c.pid, &ws, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return ws, err
		}
	}
}

func (c child) signal(sig unix.Signal) error {
	return control(c.pidfd, func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) })
}
