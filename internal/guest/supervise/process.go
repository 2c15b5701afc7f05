package supervise

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a program that runs, or ran.
type process struct {
	pid     int
	started uint64
	child   bool // of this server, which must reap it
	pidfd   *os.File

	ended   chan struct{} // closed when it has ended
	exit    Exit          // then
	watched chan struct{} // closed when nobody watches it any more
}

// adopt takes over a program that another server started; nil: it has ended.
func adopt(n note) (*process, error) {
	if n.pid == 0 {
		return nil, nil
	}
	fd, err := unix.PidfdOpen(n.pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", n.pid, err)
	}
	// The pid may be somebody else's by now; the descriptor holds whose it is.
	if started, err := startOf(n.pid); err != nil || started != n.started {
		_ = unix.Close(fd)
		return nil, nil
	}
	return watch(n.pid, n.started, fd, false), nil
}

// watch begins to wait for the end of a program. It owns fd.
func watch(pid int, started uint64, fd int, child bool) *process {
	p := &process{
		pid: pid, started: started, child: child, pidfd: os.NewFile(uintptr(fd), "pidfd"),
		ended: make(chan struct{}), watched: make(chan struct{}),
	}
	go p.await()
	return p
}

// await takes no thread. It ends when the program does, or with abandon.
func (p *process) await() {
	defer close(p.watched)
	rc, err := p.pidfd.SyscallConn()
	if err == nil {
		err = rc.Read(func(fd uintptr) bool { return readable(int(fd)) })
	}
	if err != nil {
		return
	}
	if p.child {
		p.exit = reap(p.pid)
	}
	close(p.ended)
	_ = p.pidfd.Close()
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

// reap takes the exit status of a child that has ended.
func reap(pid int) Exit {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return Exit{}
		case ws.Signaled():
			return Exit{Known: true, Signal: ws.Signal()}
		default:
			return Exit{Known: true, Code: ws.ExitStatus()}
		}
	}
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// abandon stops watching the program, which goes on.
func (p *process) abandon() {
	_ = p.pidfd.Close()
	<-p.watched
}

func (p *process) signal(sig unix.Signal) error {
	rc, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := rc.Control(func(fd uintptr) { inner = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return unix.ESRCH // closed: it has ended
	}
	return inner
}

// Find returns where a program is: in the directories of path, a list as PATH
// is, unless its name has a slash.
func Find(path, name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, runnable(name)
	}
	for _, dir := range filepath.SplitList(path) {
		if path := filepath.Join(dir, name); runnable(path) == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("program %s is not in %s", name, path)
}

func runnable(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if fi.IsDir() || fi.Mode()&0o111 == 0 {
		return &os.PathError{Op: "run", Path: path, Err: unix.EACCES}
	}
	return nil
}

// spawn starts the unit's program, born into its cgroup.
func (u *unit) spawn() (*process, error) {
	path, err := Find(u.def.Path, u.def.Argv[0])
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", u.def.Name, err)
	}
	group, err := u.openCgroup()
	if err != nil {
		return nil, err
	}
	defer unix.Close(group)
	out, err := u.journal.writer()
	if err != nil {
		return nil, err
	}
	defer unix.Close(out)
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	defer unix.Close(null)
	pidfd := -1
	pid, err := forkExec(path, u.def.Argv, &syscall.ProcAttr{
		Dir: u.def.Cwd, Env: environment(u.def), Files: []uintptr{uintptr(null), uintptr(out), uintptr(out)},
		Sys: &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: group, PidFD: &pidfd},
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	if pidfd < 0 || unix.SetNonblock(pidfd, true) != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		reap(pid)
		return nil, fmt.Errorf("start %s: the kernel gives no pidfd; Linux 5.10 or newer is needed", path)
	}
	// The server's own score, which is inherited, keeps the kernel away from it.
	score := strconv.Itoa(u.def.OOMScoreAdj)
	if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(score), 0); err != nil {
		u.s.p.Log.Warn("set the OOM score of a service", "service", u.def.Name, "error", err)
	}
	started, err := startOf(pid)
	if err != nil {
		u.s.p.Log.Warn("look at a service", "service", u.def.Name, "error", err)
	}
	return watch(pid, started, pidfd, true), nil
}

// ordinarySlack is Linux' own lateness of timers, in nanoseconds.
const ordinarySlack = 50_000

// forkExec starts the program with the timer slack of an ordinary process: that
// of the server is larger, and is the calling thread's.
func forkExec(path string, argv []string, attr *syscall.ProcAttr) (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, ordinarySlack, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("set timer slack: %w", err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }() // the thread's own again
	return syscall.ForkExec(path, argv, attr)
}

// environment adds what every program takes for granted.
func environment(def Unit) []string {
	has := map[string]bool{}
	for _, e := range def.Env {
		name, _, _ := strings.Cut(e, "=")
		has[name] = true
	}
	full := slices.Clone(def.Env)
	if !has["PATH"] {
		full = append(full, "PATH="+def.Path)
	}
	if !has["HOME"] {
		full = append(full, "HOME=/root")
	}
	return full
}
