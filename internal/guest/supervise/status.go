package supervise

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// State is what a unit is doing.
type State string

// The states.
const (
	Stopped  State = "stopped"  // nobody wants it, or it was stopped
	Waiting  State = "waiting"  // for a unit that it needs
	Starting State = "starting" // it is being started, or runs and is not ready yet
	Ready    State = "ready"    // it runs, and said that it serves
	Failed   State = "failed"   // it ended or did not start; it will be started again
	Stopping State = "stopping" // it was asked to end
)

// Words of a ServiceStatus of arcbox.v1.
const (
	WordReady    = "ready"
	WordNotReady = "not_ready"
	WordError    = "error"
)

// Status is a unit at one instant.
type Status struct {
	Name  string
	State State
	// Since is when the state began.
	Since time.Time
	// PID is its program's, 0: none runs.
	PID int
	// Said is what it said last when it was asked whether it is ready, or why it
	// did not start.
	Said string
	// Crashes is how often its program ended without being asked to.
	Crashes uint32
	// Last is how its program ended last. Nil: it never did.
	Last *Exit
	// Lines are the last that it wrote before that, oldest first.
	Lines []string
	// Next is when it will be started again; only for Failed.
	Next time.Time
}

// Exit is how a program ended.
type Exit struct {
	// Known: this server started it. Else only PID 1 was told how it ended.
	Known  bool
	Code   int
	Signal unix.Signal // 0: it ended by itself
}

// String says it in words.
func (e Exit) String() string {
	switch {
	case !e.Known:
		return "ended unseen"
	case e.Signal != 0:
		return "killed by signal " + unix.SignalName(e.Signal)
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// Word is the state as ServiceStatus has it: "ready", "not_ready" or "error".
func (s Status) Word() string {
	switch s.State {
	case Ready:
		return WordReady
	case Failed:
		return WordError
	}
	return WordNotReady
}

// Detail tells people what the state is and how it came to be.
func (s Status) Detail() string {
	return strings.Join(append([]string{s.now()}, s.history()...), "; ")
}

// History is Detail without what the state is, and may be empty.
func (s Status) History() string { return strings.Join(s.history(), "; ") }

func (s Status) history() []string {
	var parts []string
	if s.Crashes > 0 {
		parts = append(parts, fmt.Sprintf("crashed %s, last: %s", times(s.Crashes), s.last()))
	}
	if s.State == Failed && !s.Next.IsZero() {
		parts = append(parts, fmt.Sprintf("next start in %s", max(0, time.Until(s.Next)).Round(100*time.Millisecond)))
	}
	return parts
}

func (s Status) now() string {
	switch s.State {
	case Ready:
		if s.Said != "" {
			return s.Said
		}
		return "running"
	case Waiting, Starting, Failed:
		if s.Said != "" {
			return string(s.State) + ": " + s.Said
		}
	}
	return string(s.State)
}

func (s Status) last() string {
	text := "unknown"
	if s.Last != nil {
		text = s.Last.String()
	}
	if len(s.Lines) > 0 {
		text += ": " + s.Lines[len(s.Lines)-1]
	}
	return text
}

func times(n uint32) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}
