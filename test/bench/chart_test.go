package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

func chartReport() *report {
	r := &report{Exec: []sample{{20_000, 30_000}, {21_000, 25_000}, {22_000, 90_000}}}
	r.Machine.CPU = "A & B <fast>"
	r.Contests = []contest{{
		Name: createToExec, Sides: []string{sideFloor, sideHutch, "libvirt & co"},
		Rounds: []map[string]int64{{sideFloor: 200_000, sideHutch: 240_000, "libvirt & co": 9_000_000}, {sideFloor: 210_000, sideHutch: 250_000}},
	}, {Name: "nobody took part", Sides: []string{sideFloor}}}
	return r
}

func TestChartIsXMLAndAlwaysTheSame(t *testing.T) {
	r := chartReport()
	first := r.chart()
	if first != r.chart() {
		t.Error("two charts of one report differ")
	}
	d := xml.NewDecoder(strings.NewReader(first))
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, first)
		}
	}
	for _, want := range []string{"libvirt &amp; co", "9 s", "205 ms", "25 ms to 90 ms", ">10 s<", ">10 ms<"} {
		if !strings.Contains(first, want) {
			t.Errorf("no %q in\n%s", want, first)
		}
	}
	if strings.Contains(first, "nobody") || strings.Contains(first, "NaN") || strings.Contains(first, "Inf") {
		t.Errorf("a contest without rounds is drawn:\n%s", first)
	}
}

func TestChartOfNothing(t *testing.T) {
	if got := (&report{}).chart(); strings.Contains(got, "NaN") || strings.Contains(got, "Inf") {
		t.Error(got)
	}
}

// TestDecades: bars never leave the scale.
func TestDecades(t *testing.T) {
	for _, c := range []struct{ min, max, lo, hi float64 }{
		{20_000, 90_000, 1e4, 1e5}, {1e4, 1e5, 1e4, 1e5}, {1e4, 1e4, 1e4, 1e5}, {580, 11e6, 100, 1e8}, {0, 0, 1, 10},
	} {
		lo, hi := decades([]chartGroup{{bars: []chartBar{{spread: spread{c.min, c.min, c.max}}}}})
		if lo != c.lo || hi != c.hi {
			t.Errorf("%v to %v: %v to %v, want %v to %v", c.min, c.max, lo, hi, c.lo, c.hi)
		}
	}
}

func TestDuration(t *testing.T) {
	for us, want := range map[float64]string{1: "1 µs", 581: "581 µs", 5142: "5.14 ms", 32461: "32.5 ms", 100e3: "100 ms", 2.19e6: "2.19 s", 10e6: "10 s"} {
		if got := duration(us); got != want {
			t.Errorf("%v: %q, want %q", us, got, want)
		}
	}
}
