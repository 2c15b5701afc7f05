package main

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
)

// The targets of the specification.
const (
	createTarget   = 1.15
	execTarget     = 1.3
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
	line("| | |\n|---|---|")
	line("| run | %s, took %s, hutch %s at %s |", r.At.Format("2006-01-02 15:04 UTC"), r.Took, r.Versions.Hutch, r.Versions.Commit)
	line("| machine | %s, %d cores, %.1f GiB, Linux %s |", r.Machine.CPU, r.Machine.Cores, float64(r.Machine.MemoryKiB)/(1<<20), r.Machine.Kernel)
	line("| load average | %s at the start, %s at the end |", r.Machine.Load, r.Machine.LoadEnd)
	line("| VMM | %s, %s (%s) |", r.Versions.VMM, r.Versions.Accel, r.Versions.AccelReason)
	line("| guest | Linux %s, 1 vCPU, %d MiB, template `minimal` |\n", r.Versions.GuestKernel, r.Plan.MemoryMB)
	r.timeTable(line)
	r.floors(line)
	r.createText(line)
	r.memoryText(line)
	b.WriteString(notes)
	return b.String()
}

type liner func(format string, args ...any)

func (r *report) timeTable(line liner) {
	line("## Time\n")
	line("| what | pairs | floor | hutch | ratio | target |\n|---|---|---|---|---|---|")
	create := make([]sample, len(r.Create))
	for i, s := range r.Create {
		create[i] = s.sample
	}
	for _, row := range []struct {
		name    string
		samples []sample
		unit    string
		scale   float64
		target  float64
	}{
		{"cold create, API call to reply", create, " s", 1e6, createTarget},
		{"exec of `true`, API call to reply", r.Exec, " ms", 1e3, execTarget},
		{"the same by `hutch exec`, process start to exit", r.CLIExec, " ms", 1e3, 0},
		{"pause and resume", r.Pause, " ms", 1e3, 0},
	} {
		ratio := spreadOf(row.samples, sample.ratio)
		target := "none, for information"
		if row.target > 0 {
			target = fmt.Sprintf("%.2f: %s", row.target, verdict(ratio.median <= row.target))
		}
		line("| %s | %d | %s | %s | %s | %s |", row.name, len(row.samples),
			spreadOf(row.samples, func(s sample) float64 { return float64(s.Floor) }).format(row.unit, row.scale, 2),
			spreadOf(row.samples, func(s sample) float64 { return float64(s.Hutch) }).format(row.unit, row.scale, 2),
			ratio.format("", 1, 3), target)
	}
	for _, row := range []struct {
		name    string
		samples []sample
	}{{"output of a program", r.Copy}, {"the same to a client that takes gzip, Connect's default", r.CopyGzip}} {
		rate := func(of func(sample) int64) string {
			return spreadOf(row.samples, func(s sample) float64 { return float64(r.Plan.CopyBytes) / float64(of(s)) }).format(" MB/s", 1, 1)
		}
		line("| %s, %d MiB | %d | %s | %s | %s (time) | none, for information |", row.name, r.Plan.CopyBytes>>20, len(row.samples),
			rate(func(s sample) int64 { return s.Floor }), rate(func(s sample) int64 { return s.Hutch }), spreadOf(row.samples, sample.ratio).format("", 1, 3))
	}
	if len(r.Deaths) > 0 { // older samples have none
		deaths := spreadOf(r.Deaths, func(t int64) float64 { return float64(t) })
		line("| VMM killed, to the state `error` told to a caller that waits | %d | none | %s | | 1 s: %s |", len(r.Deaths),
			deaths.format(" ms", 1e3, 1), verdict(deaths.max <= deathTarget))
	}
	line("")
}

func (r *report) floors(line liner) {
	line("What the floors are:\n")
	line("- **create**: QEMU started directly, with the command line of a sandbox's own QEMU: the same binary, accelerator, machine, processor, kernel, kernel command line,")
	line("  memory and devices, the same image and module disks, and a copy of the same data disk made before the clock starts. Left out are the confinement and the network behind the card.")
	line("  Its initramfs holds the same modules and a static init of %.1f MB (`test/bench/guestinit`) that loads them, mounts image and data disk as an overlay, moves there and", float64(r.Guest.BareInitrd)/1e6)
	line("  answers a ping on the virtio-serial port. The clock runs from the start of the process to that answer.")
	line("- **exec**: one line over virtio-serial; that init starts `/bin/true` of the same image, waits for it and answers with one line. No cgroup, no user, no session, no streams.")
	line("- **output**: that init copies the output of the same `dd if=/dev/zero bs=64k` from a pipe to the port, 64 KiB at a time, with nothing around it.")
	line("- **pause and resume**: `stop` and `cont` over QMP. hutch also writes the state to its record on disk, twice, and tells its events.\n")
}

func (r *report) createText(line liner) {
	line("## Where a create goes\n")
	line("| stage of the reply | median | share |\n|---|---|---|")
	total := spreadOf(r.Create, func(s createSample) float64 { return float64(s.Hutch) }).median
	for _, name := range stageNames() {
		m := spreadOf(r.Create, func(s createSample) float64 { return float64(s.Stages[name]) }).median
		line("| %s | %.1f ms | %.1f %% |", name, m/1e3, 100*m/total)
	}
	at := func(i int) float64 {
		return spreadOf(r.Create, func(s createSample) float64 { return float64(s.BareBoot[i]) }).median / 1e6
	}
	if slices.ContainsFunc(r.Create, func(s createSample) bool { return len(s.BareBoot) < 5 }) {
		return
	}
	serve := spreadOf(r.Create, func(s createSample) float64 { return float64(s.ServeAt) }).median / 1e6
	line("\nInside the guest, after its kernel's start (medians): the bare init begins at %.2f s, has its modules loaded at %.2f s, its root mounted at %.2f s, its port open at %.2f s.", at(0), at(2), at(3), at(4))
	line("hutch's PID 1 has done all its steps and starts the agent's server at %.2f s. What is left of `hello` is the server's own start and the handshake.\n", serve)
}

func stageNames() []string {
	return []string{"record", "queue", "disk", "slot", "launch", "hello", "configure", "running"}
}

func (r *report) memoryText(line liner) {
	line("## Memory and idleness\n")
	line("| hutchd with | VmRSS | PSS | CPU time over %d s idle | context switches | target |\n|---|---|---|---|---|---|", r.Plan.IdleSec)
	for _, s := range r.Idle {
		limit := daemonBaseMiB + daemonEachMiB*float64(s.Sandboxes)
		rss := float64(s.RSSKiB) / 1024
		line("| %d sandboxes | %.1f MiB | %.1f MiB | %d ticks of 10 ms (%.1f ms) | %d | %.1f MiB: %s; no CPU: %s |", s.Sandboxes, rss, float64(s.PSSKiB)/1024,
			s.Ticks, float64(s.CPU)/1e3, s.Switches, limit, verdict(rss <= limit), verdict(s.Ticks == 0))
	}
	if n := len(r.Idle); n > 1 && r.Idle[n-1].Sandboxes > r.Idle[1].Sandboxes {
		a, z := r.Idle[1], r.Idle[n-1]
		line("\nFrom %d to %d sandboxes hutchd grew by %.2f MiB a sandbox (target %.1f).", a.Sandboxes, z.Sandboxes,
			float64(z.RSSKiB-a.RSSKiB)/1024/float64(z.Sandboxes-a.Sandboxes), daemonEachMiB)
	}
	g := r.Guest
	line("\n| guest agent | VmRSS | PSS | target |\n|---|---|---|---|")
	mib := func(kib int64) float64 { return float64(kib) / 1024 }
	line("| PID 1 | %.1f MiB | %.1f MiB | |", mib(g.InitRSSKiB), mib(g.InitPSSKiB))
	line("| server | %.1f MiB | %.1f MiB | |", mib(g.ServeRSSKiB), mib(g.ServePSSKiB))
	rss, pss := mib(g.InitRSSKiB+g.ServeRSSKiB), mib(g.InitPSSKiB+g.ServePSSKiB)
	line("| both | %.1f MiB (pages they share count twice) | %.1f MiB | %d MiB: %s by PSS, %s by the sum of VmRSS |\n", rss, pss, agentRSSMiB, verdict(pss <= agentRSSMiB), verdict(rss <= agentRSSMiB))
	line("`hutch-agent` is %.1f MB on disk (target 15 MB: %s); the boot initramfs is %.1f MB. An idle guest of %d MiB has %.0f of its %.0f MiB available.",
		float64(g.BinaryBytes)/1e6, verdict(float64(g.BinaryBytes) <= agentDiskBytes), float64(g.InitrdBytes)/1e6, r.Plan.MemoryMB, mib(g.MemFreeKiB), mib(g.MemTotalKiB))
}
