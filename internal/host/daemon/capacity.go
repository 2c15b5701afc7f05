package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/lifecycle"
)

// memory is what this machine has, in bytes.
type memory struct {
	total     int64
	available int64 // to new processes, without swapping
}

func readMemory() (memory, error) {
	table, err := procTable("/proc/meminfo")
	if err != nil {
		return memory{}, err
	}
	m := memory{table["MemTotal"], table["MemAvailable"]}
	if m.total == 0 || m.available == 0 {
		return memory{}, errors.New("read /proc/meminfo: it does not tell MemTotal and MemAvailable")
	}
	return m, nil
}

// freeDisk tells what is free in the file system at dir, in bytes.
func freeDisk(dir string) (int64, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if errors.Is(err, unix.EINTR) { // a file system over a network may
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("ask for free space of %s: %w", dir, err)
		}
		return int64(st.Bavail) * st.Bsize, nil
	}
}

// capacity is what admission goes by.
func capacity(root string) (lifecycle.Capacity, error) {
	m, err := readMemory()
	if err != nil {
		return lifecycle.Capacity{}, err
	}
	free, err := freeDisk(root)
	return lifecycle.Capacity{MemoryMB: int(m.available >> 20), DiskMB: int(free >> 20)}, err
}

// procTable reads a file of "Name: number kB" lines, in bytes. What is no such
// line is passed over.
func procTable(path string) (map[string]int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string]int64{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, rest, ok := strings.Cut(lines.Text(), ":")
		fields := strings.Fields(rest)
		if !ok || len(fields) == 0 {
			continue
		}
		if n, err := strconv.ParseInt(fields[0], 10, 64); err == nil {
			out[name] = n << 10
		}
	}
	return out, lines.Err()
}
