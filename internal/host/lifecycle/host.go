package lifecycle

import (
	"fmt"
	"io"
	"os"
	"strings"
)

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
