package proc

import (
	"strings"
	"testing"
)

func TestParseStat(t *testing.T) {
	rest := " S 1 2 3 0 -1 4 5 6 7 8 9 10 11 12 20 0 1 0 4711 99 100"
	for _, name := range []string{"(qemu)", "(a b)", "(a) S 1 2)", "(()", "(\n)"} {
		ticks, state, err := parseStat([]byte("42 " + name + rest))
		if ticks != 4711 || state != 'S' || err != nil {
			t.Errorf("%q: %d %c %v", name, ticks, state, err)
		}
	}
	for _, bad := range []string{"", "1 (x", "1 (x)", "1 (x) S 1 2", "1 (x)" + strings.ReplaceAll(rest, "4711", "x"), "1 (x)" + strings.Replace(rest, "S", "", 1)} {
		if ticks, state, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: taken as %d %c", bad, ticks, state)
		}
	}
}

func TestTail(t *testing.T) {
	var tail Tail
	if got := tail.Lines(3); got != "" {
		t.Errorf("empty: %q", got)
	}
	for range 1000 {
		tail.Write([]byte("0123456789\n"))
	}
	tail.Write([]byte(strings.Repeat("z", 3*tailBytes)))
	tail.Write([]byte("\nla"))
	tail.Write([]byte("st\r\n\n \n"))
	if got := tail.Lines(1); got != "last" {
		t.Errorf("last line %q", got)
	}
	if got := tail.Lines(5); len(got) > tailBytes {
		t.Errorf("%d bytes kept", len(got))
	}
	for in, want := range map[string]string{"a\x00b\x9b\u202ec": "a?b??c", " x\ty ": "x y"} {
		if got := Printable(in); got != want {
			t.Errorf("Printable(%q) = %q, want %q", in, got, want)
		}
	}
}
