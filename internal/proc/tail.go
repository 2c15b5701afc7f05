package proc

import (
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

// tailBytes is how much of the end of a stream a Tail keeps.
const tailBytes = 4 << 10

// Tail keeps the end of a stream, for messages to people. The zero value is
// ready. It is safe for concurrent use.
type Tail struct {
	mu  sync.Mutex
	buf []byte // guarded by mu
}

// Write takes p. It always succeeds.
func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p[max(0, len(p)-tailBytes):]...)
	if over := len(t.buf) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

// Lines returns the last n lines that are not blank, oldest first, joined by
// "; " and made safe to print.
func (t *Tail) Lines(n int) string {
	t.mu.Lock()
	text := string(t.buf)
	t.mu.Unlock()
	var lines []string
	for _, l := range strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }) {
		if l = Printable(l); l != "" {
			lines = append(lines, l)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// Printable returns s without leading and trailing blanks and with everything
// that is no printable character replaced by "?", so that words of a hostile
// program cannot drive a terminal or forge a log line.
func Printable(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r == utf8.RuneError || !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s))
}
