package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// chartFile is the chart of the times, beside benchmarks.md.
const chartFile = "benchmarks/times.svg"

// chartGroup is one thing that was measured, and chartBar what one side took.
type chartGroup struct {
	title string
	bars  []chartBar
}

type chartBar struct {
	label, class string // class: see chartStyle
	spread              // microseconds
}

// chartGroups are all times that have a side to stand beside.
func (r *report) chartGroups() []chartGroup {
	var groups []chartGroup
	add := func(g chartGroup) {
		if len(g.bars) > 0 {
			groups = append(groups, g)
		}
	}
	creates := make([]sample, len(r.Create))
	for i, s := range r.Create {
		creates[i] = s.sample
	}
	add(pairGroup("cold create", creates))
	for _, c := range r.Contests {
		g := chartGroup{title: c.Name}
		for _, side := range c.Sides {
			if times := c.times(side); len(times) > 0 {
				g.bars = append(g.bars, chartBar{side, classOf(side), spreadOf(times, asFloat)})
			}
		}
		add(g)
	}
	add(pairGroup("exec of true", r.Exec))
	add(pairGroup("pause and resume", r.Pause))
	return groups
}

func pairGroup(title string, samples []sample) chartGroup {
	g := chartGroup{title: title}
	if len(samples) > 0 {
		g.bars = []chartBar{
			{sideFloor, classOf(sideFloor), spreadOf(samples, func(s sample) float64 { return float64(s.Floor) })},
			{sideHutch, classOf(sideHutch), spreadOf(samples, func(s sample) float64 { return float64(s.Hutch) })},
		}
	}
	return g
}

func classOf(side string) string {
	switch {
	case side == sideFloor:
		return "floor"
	case strings.HasPrefix(side, sideHutch):
		return "hutch"
	}
	return classOther
}

// classOther is the class of what is neither hutch nor a floor.
const classOther = "other"

// chartStyle suits a light page and a dark one.
const chartStyle = `
text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.small{fill:#59636e;font-size:11px}
.page{fill:#fff}.grid{stroke:#d1d9e0}.mark{stroke:#1f2328;stroke-width:2}.span{opacity:.35}
.floor{fill:#818b98}.hutch{fill:#218bff}.other{fill:#d4a72c}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}.page{fill:#0d1117}.grid{stroke:#3d444d}.mark{stroke:#f0f6fc}}
`

// Sizes of the chart, in its own units.
const (
	chartWidth  = 900.0
	chartLeft   = 190.0 // where bars begin
	chartRight  = 650.0 // where bars end
	chartLine   = 20.0  // from one bar to the next
	chartBarH   = 12.0
	chartMargin = 16.0
)

// chart draws the times as bars on a logarithmic scale, each to its median, with
// a band from the least to the most. Equal reports give equal bytes.
func (r *report) chart() string {
	groups := r.chartGroups()
	lo, hi := decades(groups)
	x := func(us float64) float64 {
		return chartLeft + (math.Log10(max(us, lo))-math.Log10(lo))/(math.Log10(hi)-math.Log10(lo))*(chartRight-chartLeft)
	}
	var body strings.Builder
	y := chartMargin + 2*chartLine
	top := y - 4
	for _, g := range groups {
		y += chartLine * 0.8
		fmt.Fprintf(&body, "<text class=\"title\" x=\"%.0f\" y=\"%.1f\">%s</text>\n", chartMargin, y, html.EscapeString(g.title))
		y += chartLine * 0.4
		for _, b := range g.bars {
			b.draw(&body, x, y)
			y += chartLine
		}
	}
	var out strings.Builder
	height := y + chartMargin
	fmt.Fprintf(&out, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" role=\"img\" aria-label=\"%s\">\n<style>%s</style>\n",
		chartWidth, height, chartWidth, height, "Times of hutch beside their floors, on a logarithmic scale", chartStyle)
	fmt.Fprintf(&out, "<rect class=\"page\" width=\"%.0f\" height=\"%.0f\"/>\n", chartWidth, height)
	fmt.Fprintf(&out, "<text class=\"small\" x=\"%.0f\" y=\"%.0f\">bar: median, band: least to most; logarithmic scale; %s, %s</text>\n", chartMargin, chartMargin+8,
		html.EscapeString(r.Machine.CPU), html.EscapeString(r.Versions.Accel))
	for at := lo; at <= hi*1.001; at *= 10 {
		fmt.Fprintf(&out, "<line class=\"grid\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>\n", x(at), x(at), top, y)
		fmt.Fprintf(&out, "<text class=\"small\" text-anchor=\"middle\" x=\"%.1f\" y=\"%.1f\">%s</text>\n", x(at), top-6, duration(at))
	}
	return out.String() + body.String() + "</svg>\n"
}

// draw draws a bar whose upper edge is at y.
func (b chartBar) draw(out *strings.Builder, x func(us float64) float64, y float64) {
	base := y + chartBarH - 2
	fmt.Fprintf(out, "<text text-anchor=\"end\" x=\"%.0f\" y=\"%.1f\">%s</text>\n", chartLeft-8, base, html.EscapeString(b.label))
	fmt.Fprintf(out, "<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.0f\"/>\n", b.class, chartLeft, y, x(b.median)-chartLeft, chartBarH)
	fmt.Fprintf(out, "<rect class=\"%s span\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.0f\"/>\n", b.class, x(b.min), y-2, max(x(b.max)-x(b.min), 1), chartBarH+4)
	fmt.Fprintf(out, "<line class=\"mark\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>\n", x(b.median), x(b.median), y-2, y+chartBarH+2)
	fmt.Fprintf(out, "<text x=\"%.0f\" y=\"%.1f\">%s</text>\n", chartRight+12, base, duration(b.median))
	fmt.Fprintf(out, "<text class=\"small\" x=\"%.0f\" y=\"%.1f\">%s to %s</text>\n", chartRight+80, base, duration(b.min), duration(b.max))
}

// decades are the powers of ten, in microseconds, that all bars lie between.
func decades(groups []chartGroup) (lo, hi float64) {
	lo, hi = math.Inf(1), 0
	for _, g := range groups {
		for _, b := range g.bars {
			lo, hi = min(lo, b.min), max(hi, b.max)
		}
	}
	if hi == 0 {
		return 1, 10
	}
	lo, hi = math.Pow(10, math.Floor(math.Log10(max(lo, 1)))), math.Pow(10, math.Ceil(math.Log10(max(hi, 1))))
	return lo, max(hi, lo*10)
}

// duration writes microseconds with three digits.
func duration(us float64) string {
	switch {
	case us >= 1e6:
		return digits(us/1e6) + " s"
	case us >= 1e3:
		return digits(us/1e3) + " ms"
	}
	return digits(us) + " µs"
}

func digits(v float64) string {
	switch {
	case v >= 99.5 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case v >= 9.95:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
