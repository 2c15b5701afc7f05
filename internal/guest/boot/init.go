package boot

import (
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Back-off between restarts of the server.
const (
	firstPause = 50 * time.Millisecond
	maxPause   = 5 * time.Second
	// steady is how long a server must have lived for its next death to count
	// as the first.
	steady = 30 * time.Second
)

// Main is PID 1. It never returns.
func Main() {
	if err := boot(); err != nil {
		fail(err)
	}
	settling, err := newSettling()
	if err != nil {
		fail(err)
	}
	i := &initProcess{spawn: settling.spawnServer, settle: settling.finish, wait: wait, sleep: time.Sleep, now: time.Now}
	go i.forwardSignals(signals())
	for {
		if err := guard(i.run); err != nil {
			say("init: %v", err)
		}
	}
}

func boot() error {
	os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	if err := runSteps(stageOne(), warn); err != nil {
		return err
	}
	return runSteps(stageTwo(), warn)
}

func warn(s string) { say("boot: %s", s) }

// fail ends a machine that can't be brought up, and says why.
func fail(err error) {
	say("boot failed: %v", err)
	powerOff()
}

// say writes one line to the console.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "hutch-agent: "+format+"\n", args...)
}

// powerOff ends the machine. Should even that fail, PID 1 waits for ever: to
// return would be a kernel panic.
func powerOff() {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		say("power off: %v", err)
	}
	select {}
}

// signals returns what people and programs send to PID 1 to end a machine:
// busybox's poweroff, halt and reboot, and Ctrl-Alt-Del.
func signals() <-chan os.Signal {
	c := make(chan os.Signal, 4)
	signal.Notify(c, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT)
	return c
}

// initProcess keeps the server alive and reaps orphans. The functions are
// those of the system, or a test's.
type initProcess struct {
	spawn func() (pid int, err error)
	// settle is called once, on a goroutine of its own, when the first server
	// was started.
	settle func()
	wait   func() (pid int, status syscall.WaitStatus, err error)
	sleep  func(time.Duration)
	now    func() time.Time

	server  atomicPID
	settled sync.Once
}

// run starts the server, waits for children for ever, and starts the server
// again when it is the one that ended. Only this function waits for children,
// and only the server is a child of its own, so nobody's exit is stolen.
func (i *initProcess) run() error {
	pause := firstPause
	for {
		started := i.now()
		pid, err := i.spawn()
		if err == nil {
			i.server.set(pid)
			i.settled.Do(func() { go i.settle() })
			status := i.reapUntil(pid)
			i.server.set(0)
			say("server ended (%s), starting it again", describe(status))
		} else {
			say("start server: %v", err)
		}
		if i.now().Sub(started) >= steady {
			pause = firstPause
		}
		i.sleep(pause)
		pause = min(2*pause, maxPause)
	}
}

// reapUntil reaps children until pid is among them.
func (i *initProcess) reapUntil(pid int) syscall.WaitStatus {
	for {
		got, status, err := i.wait()
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0 // ECHILD: the server is gone without our seeing it
		case got == pid:
			return status
		}
	}
}

// forwardSignals hands a wish to end the machine to the server, which ends
// processes in order; without a server the machine is ended here.
func (i *initProcess) forwardSignals(c <-chan os.Signal) {
	for range c {
		pid := i.server.get()
		if pid == 0 || syscall.Kill(pid, syscall.SIGTERM) != nil {
			powerOff()
		}
	}
}

func wait() (int, syscall.WaitStatus, error) {
	var status syscall.WaitStatus
	pid, err := syscall.Wait4(-1, &status, 0, nil)
	return pid, status, err
}

func describe(s syscall.WaitStatus) string {
	switch {
	case s.Signaled():
		return "signal " + s.Signal().String()
	case s.Exited():
		return fmt.Sprintf("exit status %d", s.ExitStatus())
	}
	return "unknown"
}
