package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Identify tells what sets the process pid apart from every other one, before
// and after it. It is a fault.NotFound when there is no such process or it is
// a zombie.
func Identify(pid int) (sandbox.Process, error) {
	ticks, state, err := readStat(pid)
	if err != nil {
		return sandbox.Process{}, err
	}
	if state == 'Z' || state == 'X' {
		return sandbox.Process{}, fault.New(fault.NotFound, "process %d has ended", pid)
	}
	boot, err := bootID()
	if err != nil {
		return sandbox.Process{}, err
	}
	return sandbox.Process{PID: pid, StartTicks: ticks, BootID: boot}, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the host's boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// readStat returns the start in clock ticks after boot (field 22 of
// /proc/<pid>/stat, see proc(5)) and the state (field 3) of a process.
func readStat(pid int) (ticks uint64, state byte, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, 0, fault.New(fault.NotFound, "process %d is gone", pid)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read the identity of process %d: %w", pid, err)
	}
	return parseStat(b)
}

// parseStat reads the text of /proc/<pid>/stat. The second field is the name
// in parentheses and may itself hold blanks and parentheses, so that fields
// are counted after the last one.
func parseStat(b []byte) (ticks uint64, state byte, err error) {
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return 0, 0, fmt.Errorf("parse process stat: no name in %q", b)
	}
	fields := bytes.Fields(b[end+1:]) // field 3 is the first
	if len(fields) < 20 || len(fields[0]) != 1 || fields[0][0] < 'A' {
		return 0, 0, fmt.Errorf("parse process stat: %d fields after the name", len(fields))
	}
	ticks, err = strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("parse process stat: start time: %w", err)
	}
	return ticks, fields[0][0], nil
}
