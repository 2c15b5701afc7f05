package sysinfo

import (
	"math"
	"strconv"
	"strings"
	"unicode"
)

const (
	// maxText bounds each string that comes from a file, in bytes.
	maxText = 256
	// maxCPUs bounds the count of a CPU list; no kernel has more.
	maxCPUs = 1 << 16
)

// osRelease returns NAME and VERSION_ID of an os-release file. The format is
// that of os-release(5): shell assignments, of which only quoting is honoured.
func osRelease(content string) (name, version string) {
	name = "Linux" // what os-release(5) says of a file without a NAME
	for line := range strings.Lines(content) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		switch key {
		case "NAME":
			if v := tidy(unquote(value)); v != "" {
				name = v
			}
		case "VERSION_ID":
			version = tidy(unquote(value))
		}
	}
	return name, version
}

// unquote undoes the quotes and backslashes of a shell assignment.
func unquote(s string) string {
	if len(s) < 2 {
		return s
	}
	switch q := s[0]; {
	case q == '\'' && s[len(s)-1] == q:
		return s[1 : len(s)-1]
	case q == '"' && s[len(s)-1] == q:
		s = s[1 : len(s)-1]
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// tidy makes s valid UTF-8 without control characters, of at most maxText bytes.
func tidy(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "")
	}
	return s
}

// memory returns the bytes of MemTotal and MemAvailable.
func memory(meminfo string) (total, available uint64) {
	for line := range strings.Lines(meminfo) {
		key, rest, ok := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if !ok || len(fields) == 0 {
			continue
		}
		kib, err := strconv.ParseUint(fields[0], 10, 54)
		if err != nil {
			continue
		}
		switch key {
		case "MemTotal":
			total = kib << 10
		case "MemAvailable":
			available = kib << 10
		}
	}
	return total, available
}

func load(loadavg string) (l [3]float64) {
	fields := strings.Fields(loadavg)
	for i := range min(len(l), len(fields)) {
		l[i] = number(fields[i])
	}
	return l
}

func uptime(content string) uint64 {
	first, _, _ := strings.Cut(content, " ")
	return uint64(number(strings.TrimSpace(first)))
}

// number returns the value of s when it is one that a machine can have, else 0.
func number(s string) float64 {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(f) || f < 0 || f > 1e15 {
		return 0
	}
	return f
}

// countList counts the members of a kernel list such as "0-3,6"; 0 when it is
// none.
func countList(list string) uint32 {
	var n uint64
	for part := range strings.SplitSeq(strings.TrimSpace(list), ",") {
		low, high, isRange := strings.Cut(part, "-")
		if !isRange {
			high = low
		}
		from, err := strconv.ParseUint(low, 10, 16)
		to, err2 := strconv.ParseUint(high, 10, 16)
		if err != nil || err2 != nil || to < from {
			return 0
		}
		if n += to - from + 1; n > maxCPUs {
			return 0
		}
	}
	return uint32(n)
}
