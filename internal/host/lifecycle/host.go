package lifecycle

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// HostCapacity returns a Params.Capacity that reads MemAvailable of
// /proc/meminfo and the free space of the file system at dir.
func HostCapacity(dir string) func() (Capacity, error) {
	return func() (Capacity, error) {
		b, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			return Capacity{}, err
		}
		mem, err := memAvailable(b)
		if err != nil {
			return Capacity{}, err
		}
		var fs unix.Statfs_t
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			err = unix.Statfs(dir, &fs)
		}
		if err != nil {
			return Capacity{}, fmt.Errorf("ask for free space of %s: %w", dir, err)
		}
		return Capacity{MemoryMB: mem, DiskMB: int(fs.Bavail * uint64(fs.Bsize) >> 20)}, nil
	}
}

func memAvailable(meminfo []byte) (mb int, err error) {
	lines := bufio.NewScanner(bytes.NewReader(meminfo))
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), "MemAvailable:")
		if !ok {
			continue
		}
		kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(rest, "kB")))
		if err != nil {
			return 0, fmt.Errorf("parse MemAvailable: %w", err)
		}
		return kb >> 10, nil
	}
	return 0, errors.New("no MemAvailable in /proc/meminfo")
}

func hostBootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// lastWords returns the end of a log, made safe to show; empty when there is
// none. What is in it was written by a guest.
func lastWords(path string) string {
	const tail, lines, shown = 4096, 6, 600
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return ""
	}
	from := max(0, info.Size()-tail)
	b, err := io.ReadAll(io.NewSectionReader(f, from, tail))
	if err != nil {
		return ""
	}
	var last []string
	for l := range strings.Lines(string(b)) {
		if l = printable(l, shown/lines); l != "" {
			last = append(last, l)
		}
	}
	return strings.Join(last[max(0, len(last)-lines):], " | ")
}
