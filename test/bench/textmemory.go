package main

import "fmt"

func (r *report) memoryText(line liner) {
	if len(r.Idle) == 0 {
		return
	}
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

// clonesText tells what idle copies of one machine cost.
func (r *report) clonesText(line liner) {
	if len(r.Clones) == 0 {
		return
	}
	line("## Memory of idle clones\n")
	line("Of each VMM's process, in MiB; the median of all. PSS shares out what several have; private is what no other process has. Of that, guest is guest memory,")
	line("and code what an emulating QEMU has translated, in pages of up to 2 MiB. Of one clone alone, all that it reads of the shared memory is its own.\n")
	line("| clones | who | PSS | private | guest | code | ratio of PSS | target |\n|---|---|---|---|---|---|---|---|")
	for _, n := range r.Plan.Clones {
		floor, hutch := r.clonesOf(sideFloor, n), r.clonesOf(sideHutch, n)
		if floor == nil || hutch == nil {
			continue
		}
		ratio := hutch.median(pssOf) / floor.median(pssOf)
		line("| %d | %s | %s | | |", n, sideFloor, floor.mib())
		line("| %d | %s | %s | **%.2f** | %.1f: %s |", n, sideHutch, hutch.mib(), ratio, cloneTarget, verdict(ratio <= cloneTarget))
	}
	line("")
}

// mib are the columns of a side.
func (c *clones) mib() string {
	mib := func(of func(rss) int64) float64 { return c.median(of) / 1024 }
	return fmt.Sprintf("%.1f | %.1f | %.1f | %.1f", mib(pssOf), mib(privateOf), mib(guestOf), mib(codeOf))
}
