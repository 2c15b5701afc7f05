package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// settledFD is where the server finds the reading end of the pipe that ends
// when the boot has settled.
const settledFD = 3

// serverSlack is how late a timer of the server may be, in nanoseconds, so that
// the kernel can do it together with something else. The Go runtime's monitor
// sleeps 20 microseconds at a time while anything runs: as many interrupts and
// switches as all the rest of a short command, and dear under emulation.
const serverSlack = 4e6

// serverRuntime has the Go runtime of the server leave its goroutines their
// turns, and the number of processors alone: both cost a copy of the guest,
// which was asleep a moment ago, code that it runs for nothing. No code of the
// server runs for long without a call, which is where goroutines take turns.
const serverRuntime = "GODEBUG=asyncpreemptoff=1,updatemaxprocs=0"

// settling is the last part of the boot, beside the server.
type settling struct {
	reader, writer *os.File
}

func newSettling() (*settling, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make the pipe that tells the end of the boot: %w", err)
	}
	return &settling{r, w}, nil
}

// spawnServer starts this very program again, from memory: its file went with
// the initramfs. It is born into its cgroup, since moving it there later would
// wait for the kernel.
func (s *settling) spawnServer() (int, error) {
	cgroup, err := os.OpenFile(AgentCgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer cgroup.Close()
	// The slack is of this thread, and the server's threads are born with it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, serverSlack, 0, 0, 0); err != nil {
		warn(fmt.Sprintf("set timer slack: %v", err))
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }()
	return syscall.ForkExec("/proc/self/exe", []string{"hutch-agent", "serve"}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   append(os.Environ(), serverRuntime),
		Files: []uintptr{0, 1, 2, settledFD: s.reader.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())},
	})
}

// finish runs the last stage while nobody else wants the processor: the
// server, which the host waits for, always comes first.
func (s *settling) finish() {
	runtime.LockOSThread()
	yield(unix.SCHED_IDLE)
	err := runSteps(stageThree(), warn)
	yield(unix.SCHED_NORMAL)
	runtime.UnlockOSThread()
	if err != nil {
		fail(err)
	}
	_ = s.writer.Close() // every reader sees the end, also of servers to come
}

// yield gives the calling thread a scheduling policy. Without it the boot only
// takes its turns as everybody does.
func yield(policy uint32) {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: policy}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		warn(fmt.Sprintf("set scheduling policy %d: %v", policy, err))
	}
}

// AwaitSettled waits, in the server, until PID 1 is through with the boot. Call
// it once, before anything that the server starts could inherit the pipe.
func AwaitSettled() error {
	unix.CloseOnExec(settledFD)
	pipe := os.NewFile(settledFD, "settled")
	defer pipe.Close()
	if _, err := pipe.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("await the end of the boot: %w", err)
	}
	return nil
}
