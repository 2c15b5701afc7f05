package process

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Normal reports whether the program ended by itself with an exit code.
func (e Exit) Normal() bool { return e.Signal == 0 && !e.TimedOut }

// Status says how it ended in words: "exit status 3", "signal: killed",
// "timed out".
func (e Exit) Status() string {
	switch {
	case e.TimedOut:
		return "timed out"
	case e.Signal != 0:
		return "signal: " + e.Signal.String()
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// Problem is empty after exit code 0, else Status with the reason where one is
// known.
func (e Exit) Problem() string {
	switch {
	case e.TimedOut:
		return fmt.Sprintf("timed out after %s: killed with everything it started", e.Limit)
	case e.OOMKilled:
		return e.Status() + " (the kernel killed a process of the tree: out of memory)"
	case e.Signal == 0 && e.Code == 0:
		return ""
	}
	return e.Status()
}

// SignalName returns "SIGKILL" and the like; empty after a normal exit.
func (e Exit) SignalName() string {
	if e.Signal == 0 {
		return ""
	}
	if name := unix.SignalName(e.Signal); name != "" {
		return name
	}
	return fmt.Sprintf("SIG%d", int(e.Signal))
}

func exitOf(ws unix.WaitStatus) Exit {
	if ws.Signaled() {
		sig := ws.Signal()
		return Exit{Code: 128 + int(sig), Signal: sig}
	}
	return Exit{Code: ws.ExitStatus()}
}

// oomKills reads the count of the memory.events file. Absent counts are 0.
func oomKills(events string) bool {
	for line := range strings.SplitSeq(events, "\n") {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}
