package process

import (
	"time"

	"golang.org/x/sys/unix"
)

// Spec says what to run.
type Spec struct {
	// Cmd is a path, or a name that is looked up in the PATH that the program
	// will have.
	Cmd  string
	Args []string
	Env  map[string]string
	// Cwd is the working directory. A relative one starts at the user's home.
	// Nil: the sandbox's default, else the user's home.
	Cwd *string
	// User names the user; see account.Files.Lookup. Empty: HeaderUser, else
	// the sandbox's default.
	User       string
	HeaderUser string
	// Tag is a name that callers can find the program by. Two live programs
	// can't have the same. May be empty.
	Tag string
	// Size asks for a terminal of that size. Nil: pipes.
	Size *Size
	// NoStdin gives a program without terminal /dev/null to read.
	NoStdin bool
	// Timeout kills the whole tree. 0: no limit.
	Timeout time.Duration
}

// Size is that of a terminal, in characters. Zero fields mean 80 and 24.
type Size struct {
	Cols, Rows uint16
}

// Stream is a source of output.
type Stream uint8

// The streams. A program with a terminal has only the terminal.
const (
	Stdout Stream = iota
	Stderr
	Terminal
)

// EventKind tells the fields of an Event that are set.
type EventKind uint8

// The kinds of events.
const (
	// Data carries output.
	Data EventKind = iota
	// End is the last event and carries the exit.
	End
	// Idle means that nothing happened for the time asked for.
	Idle
)

// Event is one thing that a Subscription saw.
type Event struct {
	Kind   EventKind
	Stream Stream
	// Data is never empty for kind Data, and at most 32 KiB.
	Data []byte
	Exit Exit
}

// Exit says how a program ended.
type Exit struct {
	// Code is the exit code, or 128 + the number of the signal.
	Code int
	// Signal is 0 after a normal exit.
	Signal unix.Signal
	// TimedOut: the time limit ended it.
	TimedOut bool
	// OOMKilled: the kernel killed something in the tree for want of memory.
	OOMKilled bool
	// Limit is the time limit, for the words.
	Limit time.Duration
}

// Info describes a program in the table.
type Info struct {
	Pid     int
	Tag     string
	Cmd     string
	Args    []string
	Env     map[string]string // as the call gave it
	Cwd     string
	User    string
	Started time.Time
	// Ended: the program is gone, its output and exit are still kept.
	Ended bool
}

// Selector finds a program by pid, or by tag when Tag is set.
type Selector struct {
	Pid int
	Tag string
}
