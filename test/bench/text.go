package main

import (
	"cmp"
	_ "embed"
	"fmt"
	"strings"
)

// The targets of the specification.
const (
	createTarget   = 1.15
	execTarget     = 1.3
	warmTarget     = 1.25
	coldTarget     = 8 // times a warm create
	readyTarget    = 15
	burstTarget    = 1.3
	cloneTarget    = 1.2
	daemonBaseMiB  = 50
	daemonEachMiB  = 0.5
	deathTarget    = 1e6 // microseconds
	agentRSSMiB    = 20
	agentDiskBytes = 15e6
)

// notes are what people found out about the figures.
//
//go:embed notes.md
var notes string

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "**missed**"
}

// text is benchmarks.md.
func (r *report) text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Benchmarks\n")
	line("Written by `make bench`; do not edit. Raw samples, in microseconds, with the command lines: [benchmarks/samples.json](benchmarks/samples.json).\n")
	line("Every figure stands beside its floor, measured in the same run, one right after the other, each side first in half of the pairs.")
	line("The speed of a processor changes within a minute, so absolute times of different runs do not compare; the ratio of a pair does.")
	line("Times are min / **median** / max. A ratio is the hutch side of a pair divided by its floor; its median is the median of the ratios.\n")
	if len(r.chartGroups()) > 0 {
		line("![Times of hutch beside their floors](%s)\n", chartFile)
	}
	line("| | |\n|---|---|")
	line("| run | %s, took %s, hutch %s at %s |", r.At.Format("2006-01-02 15:04 UTC"), r.Took, r.Versions.Hutch, r.Versions.Commit)
	line("| machine | %s, %d cores, %.1f GiB, Linux %s |", r.Machine.CPU, r.Machine.Cores, float64(r.Machine.MemoryKiB)/(1<<20), r.Machine.Kernel)
	line("| load average | %s at the start, %s at the end |", r.Machine.Load, r.Machine.LoadEnd)
	line("| VMM | %s, %s (%s) |", r.Versions.VMM, r.Versions.Accel, r.Versions.AccelReason)
	line("| guest | Linux %s, 1 vCPU, %d MiB, template `minimal` |\n", r.Versions.GuestKernel, r.Plan.MemoryMB)
	if len(r.Plan.Rows) > 0 || r.Plan.Quick {
		line("**Not a whole run: %s, quick: %v. Its figures mean little.**\n", cmp.Or(strings.Join(r.Plan.Rows, ", "), "all rows"), r.Plan.Quick)
	}
	for _, part := range []func(liner){
		r.timeTable, r.warmText, r.readyText, r.burstText, r.rivalsText, r.floors, r.createText, r.clonesText, r.memoryText,
	} {
		part(line)
	}
	b.WriteString(notes)
	return b.String()
}

type liner func(format string, args ...any)
