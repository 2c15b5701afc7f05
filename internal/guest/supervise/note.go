package supervise

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// note hands a wanted unit to the next server of this boot.
type note struct {
	pid     int    // 0: its program does not run
	started uint64 // of the program, see startOf
	ready   bool   // it has been ready
	crashes uint32
}

// noteFormat begins every note; the rest are its numbers.
const noteFormat = "hutch-unit-1"

func (n note) encode() string {
	ready := 0
	if n.ready {
		ready = 1
	}
	return fmt.Sprintf("%s %d %d %d %d\n", noteFormat, n.pid, n.started, ready, n.crashes)
}

func parseNote(text string) (note, error) {
	var n note
	var format string
	var ready int
	_, err := fmt.Sscanf(text, "%s %d %d %d %d\n", &format, &n.pid, &n.started, &ready, &n.crashes)
	if err != nil || format != noteFormat || n.pid < 0 {
		return note{}, fmt.Errorf("a note %q is not understood", text)
	}
	n.ready = ready == 1
	return n, nil
}

func readNote(path string) (note, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return note{}, err
	}
	return parseNote(string(b))
}

func (s *Supervisor) notePath(name string) string { return filepath.Join(s.p.Dir, name+".note") }

// write replaces the note of a unit.
func (n note) write(path string) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(n.encode()), 0o600); err != nil {
		return fmt.Errorf("note a service: %w", err)
	}
	return os.Rename(tmp, path)
}

// startOf returns when a process was started, in the kernel's ticks: with its
// pid that names it for good.
func startOf(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything; field 22 is the 20th behind it.
	_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("the stat of process %d is not understood", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
