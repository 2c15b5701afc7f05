package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Params says what to start.
type Params struct {
	// Path is the program, absolute. Args are its arguments, without the name.
	Path string
	Args []string
	// Env is the whole environment.
	Env []string
	// Dir is the working directory; empty: "/".
	Dir string
	// Files are the child's open files from FirstFD on. The caller closes its
	// own after Start.
	Files []*os.File
	// Log is where the child's words go; empty: nowhere, but the last words
	// are kept. LogMax is its size in bytes, 0: DefaultLogMax.
	Log    string
	LogMax int64
	// Credential is whom the child runs as; nil: as its parent.
	Credential *syscall.Credential
	// UIDs and GIDs, when there are any, give the child a user namespace of its
	// own, which Credential is about, and one of processes, which ends with it.
	UIDs, GIDs []syscall.SysProcIDMap
	// Cgroup is an open cgroup v2 directory to be born in; nil: the parent's.
	Cgroup *os.File
	// Spawn calls fork on the thread whose attributes the child inherits, and
	// returns fork's error or its own. Nil: on any thread. When fork returns,
	// the child runs Path.
	Spawn func(fork func() (pid int, err error)) error
	// Logger takes what happens later; nil: nothing is logged.
	Logger *slog.Logger
}

// Exit is how a process ended.
type Exit struct {
	// Known is false for a process that is not this one's child: then nobody
	// here is told its status.
	Known  bool
	Code   int            // when it ended by itself
	Signal syscall.Signal // when not 0, it was ended by this signal
}

// String says it for people.
func (e Exit) String() string {
	switch {
	case !e.Known:
		return "ended, status unknown"
	case e.Signal != 0:
		return "ended by signal " + unix.SignalName(e.Signal)
	}
	return fmt.Sprintf("exited %d", e.Code)
}

// Process is a running or ended process. All methods are safe for concurrent
// use.
type Process struct {
	id     sandbox.Process
	handle *os.Process
	pidfd  *os.File
	log    *CappedFile // nil: none
	pipe   *os.File    // nil: could not be opened
	tail   Tail
	logger *slog.Logger

	closing  atomic.Bool
	done     chan struct{} // closed when gone and its words are read
	detached chan struct{} // closed when the watcher has ended
	exit     Exit          // set before done is closed
	close    sync.Once
}

// Start starts a child in a session of its own. It has no tie to ctx, which
// only stops a start that has not happened yet. On error there is no child.
// The caller calls Close.
func Start(ctx context.Context, p Params) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Path, err)
	}
	proc := &Process{done: make(chan struct{}), detached: make(chan struct{}), logger: orDiscard(p.Logger)}
	if err := proc.openLog(p.Log, p.LogMax); err != nil {
		return nil, err
	}
	if err := proc.spawn(p); err != nil {
		proc.free()
		return nil, fmt.Errorf("start %s: %w", p.Path, err)
	}
	go proc.watch()
	return proc, nil
}

func orDiscard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

func (p *Process) openLog(path string, max int64) (err error) {
	if path != "" {
		p.log, err = CreateCapped(path, max)
	}
	return err
}

func (p *Process) spawn(params Params) error {
	pipe, err := newLogPipe()
	if err != nil {
		return err
	}
	p.pipe = pipe.read
	defer pipe.closeChild()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()

	attr := &os.ProcAttr{
		Dir:   params.Dir,
		Env:   params.Env,
		Files: append([]*os.File{null, pipe.childWrite, pipe.childWrite, pipe.childRead}, params.Files...),
		Sys:   &syscall.SysProcAttr{Setsid: true, Credential: params.Credential},
	}
	if params.UIDs != nil {
		attr.Sys.Cloneflags = syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID
		attr.Sys.UidMappings, attr.Sys.GidMappings, attr.Sys.GidMappingsEnableSetgroups = params.UIDs, params.GIDs, true
	}
	if params.Cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(params.Cgroup.Fd())
	}
	if attr.Dir == "" {
		attr.Dir = "/"
	}
	if attr.Env == nil {
		attr.Env = []string{} // nil would mean ours
	}
	fork := func() (pid int, err error) {
		p.handle, err = os.StartProcess(params.Path, append([]string{params.Path}, params.Args...), attr)
		if err != nil {
			return 0, err
		}
		return p.handle.Pid, nil
	}
	if params.Spawn != nil {
		err = params.Spawn(fork)
	} else {
		_, err = fork()
	}
	if p.handle == nil {
		return errors.Join(err, errorIf(err == nil, "nothing was started"))
	}
	// From here on there is a child; until it is reaped its pid is its own.
	if err == nil {
		p.id, err = Identify(p.handle.Pid)
		if fault.Is(err, fault.NotFound) {
			// It ended before it could be looked at: its words tell why.
			err = p.lateIdentity()
		}
	}
	if err == nil {
		p.pidfd, err = openPidfd(p.handle.Pid)
	}
	if err != nil {
		p.handle.Kill()
		p.handle.Wait()
		return err
	}
	return nil
}

// lateIdentity fills the identity of a child that is a zombie already.
func (p *Process) lateIdentity() error {
	ticks, _, err := readStat(p.handle.Pid)
	if err != nil {
		return err
	}
	boot, err := bootID()
	p.id = sandbox.Process{PID: p.handle.Pid, StartTicks: ticks, BootID: boot}
	return err
}

func errorIf(cond bool, msg string) error {
	if cond {
		return errors.New(msg)
	}
	return nil
}

func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// AdoptParams says where an adopted process goes on to log, as in Params.
type AdoptParams struct {
	Log    string
	LogMax int64
	Logger *slog.Logger
}

// Adopt takes up a process that an earlier process, or this one, started and
// let go of by Close or by dying. It is a fault.NotFound when that very
// process is gone, whatever has its pid now. The caller calls Close.
func Adopt(ctx context.Context, id sandbox.Process, params AdoptParams) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("adopt process %d: %w", id.PID, err)
	}
	gone := func() error {
		return fault.New(fault.NotFound, "process %d, started at tick %d, is gone", id.PID, id.StartTicks)
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if id.PID <= 1 || id.BootID != boot {
		return nil, gone()
	}
	p := &Process{id: id, done: make(chan struct{}), detached: make(chan struct{}), logger: orDiscard(params.Logger)}
	// Both handles first, the look at the start time after: then the handles
	// can only mean the process that was looked at, or one before it.
	if p.pidfd, err = openPidfd(id.PID); errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, gone()
	} else if err != nil {
		return nil, err
	}
	if p.handle, err = os.FindProcess(id.PID); err != nil {
		p.free()
		return nil, fmt.Errorf("open process %d: %w", id.PID, err)
	}
	ticks, state, err := readStat(id.PID)
	if err != nil {
		p.free()
		return nil, err
	}
	if ticks != id.StartTicks {
		p.free()
		return nil, gone()
	}
	if state == 'Z' || state == 'X' {
		p.handle.Wait() // it may be our own child, let go of before its end
		p.free()
		return nil, gone()
	}
	if err := p.openLog(params.Log, params.LogMax); err != nil {
		p.free()
		return nil, err
	}
	if p.pipe, err = reopenPipe(fmt.Sprintf("/proc/%d/fd/%d", id.PID, LogFD)); err != nil {
		// The process matters more than its words.
		p.logger.Warn("log of adopted process is lost", "pid", id.PID, "error", err)
	}
	go p.watch()
	return p, nil
}

// watch reads the log until the process is gone, then reaps it.
func (p *Process) watch() {
	defer close(p.detached)
	var words sync.WaitGroup
	words.Go(p.readLog)
	gone := p.waitGone()
	if p.pipe != nil {
		p.pipe.SetReadDeadline(time.Now()) // ends the reader
	}
	words.Wait()
	if !gone {
		return
	}
	if p.pipe != nil {
		drain(p.pipe, p.words())
	}
	if state, err := p.handle.Wait(); err == nil {
		status := state.Sys().(syscall.WaitStatus)
		p.exit.Known = true
		if status.Signaled() {
			p.exit.Signal = status.Signal()
		} else {
			p.exit.Code = status.ExitStatus()
		}
	}
	close(p.done)
}

// words is where the child's output goes.
func (p *Process) words() io.Writer {
	if p.log == nil {
		return &p.tail
	}
	return io.MultiWriter(&p.tail, p.log)
}

func (p *Process) readLog() {
	if p.pipe == nil {
		return
	}
	to := p.words()
	buf := make([]byte, 4<<10)
	pace := time.NewTimer(0)
	defer pace.Stop()
	for {
		n, err := p.pipe.Read(buf)
		to.Write(buf[:n]) // a log takes every byte
		if err != nil {
			return // all writers are gone, or the deadline came
		}
		if n == len(buf) {
			// A flood: what comes faster is lost in the pipe, and costs nothing
			// here.
			pace.Reset(time.Second * time.Duration(n) / logBytesPerSecond)
			<-pace.C
		}
	}
}

// waitGone waits for the end of the process, or for Close. A pidfd becomes
// readable when its process has ended.
func (p *Process) waitGone() bool {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	for {
		gone := false
		err = conn.Read(func(fd uintptr) bool {
			set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, perr := unix.Poll(set, 0)
			gone = perr == nil && n > 0
			return gone || perr == unix.EINTR
		})
		if gone {
			return true
		}
		if err != nil || p.closing.Load() {
			return false
		}
	}
}

// ID is what Adopt needs.
func (p *Process) ID() sandbox.Process { return p.id }

// Done is closed when the process is gone, its last words are read and, when
// it was this one's child, it is reaped. It stays open after Close.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit tells how the process ended. It may be called after Done is closed.
func (p *Process) Exit() Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return Exit{}
	}
}

// LastWords returns the last few lines of the process's output, safe to print.
func (p *Process) LastWords() string { return p.tail.Lines(3) }

// Signal sends sig. A process that has ended is no error; after Close it is
// os.ErrClosed.
func (p *Process) Signal(sig syscall.Signal) error {
	if p.closing.Load() {
		return fmt.Errorf("signal process %d: %w", p.id.PID, os.ErrClosed)
	}
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.id.PID, err)
	}
	var sent error
	err = conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if err = errors.Join(err, sent); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.id.PID, err)
	}
	return nil
}

// Kill ends the process at once and waits until Done.
func (p *Process) Kill(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		return err
	}
	return p.wait(ctx)
}

func (p *Process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-p.detached:
		select {
		case <-p.done:
			return nil
		default:
			return fmt.Errorf("wait for process %d: %w", p.id.PID, os.ErrClosed)
		}
	case <-ctx.Done():
		return fmt.Errorf("wait for process %d: %w", p.id.PID, ctx.Err())
	}
}

// Stop asks the process to end by SIGTERM, gives it grace, then kills it. It
// waits until Done. When ctx ends earlier it returns, and the process may live.
func (p *Process) Stop(ctx context.Context, grace time.Duration) error {
	if err := p.Signal(unix.SIGTERM); err != nil {
		return err
	}
	patience, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if err := p.wait(patience); err == nil || ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
		return err
	}
	return p.Kill(ctx)
}

// Close lets go of the process without ending it, and waits for the watcher.
// After it, Adopt may take the process up again, here or elsewhere. A child
// that nobody adopts here stays a zombie after its end until this process
// ends. Close is idempotent.
func (p *Process) Close() error {
	p.close.Do(func() {
		p.closing.Store(true)
		p.pidfd.SetReadDeadline(time.Now())
		<-p.detached
		p.free()
	})
	return nil
}

// free closes what is open. The watcher has ended, or never ran.
func (p *Process) free() {
	for _, f := range []*os.File{p.pidfd, p.pipe} {
		if f != nil {
			f.Close()
		}
	}
	if p.log != nil {
		if err := p.log.Err(); err != nil {
			p.logger.Warn("log lost words", "error", err)
		}
		p.log.Close()
	}
	if p.handle != nil {
		p.handle.Release()
	}
}
