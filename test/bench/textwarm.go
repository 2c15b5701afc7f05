package main

import (
	"slices"
)

// warmText tells what a warm create is to a cold one, and where its time goes.
func (r *report) warmText(line liner) {
	for _, warm := range []struct{ contest, word string }{{createToExec, "warm"}, {spareContest, "of a spare"}} {
		c := r.contest(warm.contest)
		ratio := spreadOf(c.pairs(sideHutch, sideCold), sample.ratio)
		if len(c.times(sideCold)) == 0 {
			continue
		}
		line("A create to the result of its first exec takes %s cold and %s %s: cold is %s times as long (target at least %d: %s).\n",
			spreadOf(c.times(sideCold), asFloat).format(" s", 1e6, 2), spreadOf(c.times(sideHutch), asFloat).format(" s", 1e6, 2), warm.word,
			ratio.format("", 1, 1), coldTarget, verdict(ratio.median >= coldTarget))
	}
	if len(r.WarmStages) == 0 {
		return
	}
	line("## Where a warm create goes\n")
	line("| stage of the reply | min / **median** / max |\n|---|---|")
	for _, name := range stagesOf(r.WarmStages) {
		line("| %s | %s |", name, spreadOf(r.WarmStages, func(s warmStages) float64 { return float64(s.Stages[name]) }).format(" ms", 1e3, 1))
	}
	line("| all of the create, API call to reply | %s |", spreadOf(r.WarmStages, func(s warmStages) float64 { return float64(s.Create) }).format(" ms", 1e3, 1))
	line("| the first exec, API call to reply | %s |\n", spreadOf(r.WarmStages, func(s warmStages) float64 { return float64(s.Exec) }).format(" ms", 1e3, 1))
}

// readyText tells what it is worth to copy a machine with something up in it.
func (r *report) readyText(line liner) {
	for _, contest := range []string{dockerContest, kubernetesContest, siteContest} {
		c := r.contest(contest)
		if len(c.times(sideCold)) == 0 {
			continue
		}
		ratio := spreadOf(c.pairs(sideHutch, sideCold), sample.ratio)
		line("A %s takes %s cold and %s copied from a machine that was saved with it up: cold is %s times as long (target at least %d: %s).\n",
			contest, spreadOf(c.times(sideCold), asFloat).format(" s", 1e6, 2), spreadOf(c.times(sideHutch), asFloat).format(" s", 1e6, 2),
			ratio.format("", 1, 1), readyTarget, verdict(ratio.median >= readyTarget))
	}
}

func asFloat(t int64) float64 { return float64(t) }

// stagesOf returns the names of the stages of warm creates, in their order.
func stagesOf(all []warmStages) []string {
	order := []string{"record", "queue", "slot", "memory", "disk", "restore", "hello", "configure", "running"}
	var others []string
	for _, s := range all {
		for name := range s.Stages {
			if !slices.Contains(order, name) && !slices.Contains(others, name) {
				others = append(others, name)
			}
		}
	}
	slices.Sort(others)
	return append(order, others...)
}

// burstText tells how many creates at once go.
func (r *report) burstText(line liner) {
	if len(r.Bursts) == 0 {
		return
	}
	cores := r.Machine.Cores
	line("## Many creates at once\n")
	line("Warm creates and an exec in each, all at the same time, until the last has its result. The bound is their processor time on %d cores: that of one alone,", cores)
	line("its VMM's until the result and hutchd's share of a row of them, measured just before.\n")
	line("| at once | runs | failed | booted instead | wall | one alone, processor time | wall / (processor time of all / cores) | target |\n|---|---|---|---|---|---|---|---|")
	failed, booted := 0, 0
	for _, s := range r.Bursts {
		failed, booted = failed+s.Failed, booted+s.Booted
	}
	ratio := spreadOf(r.Bursts, func(s burst) float64 { return s.ratio(cores) })
	line("| %d | %d | %d: %s | %d | %s | %s | %s | %.1f: %s |\n", r.Bursts[0].AtOnce, len(r.Bursts), failed, verdict(failed == 0), booted,
		spreadOf(r.Bursts, func(s burst) float64 { return float64(s.Wall) }).format(" s", 1e6, 2),
		spreadOf(r.Bursts, burst.one).format(" ms", 1e3, 0), ratio.format("", 1, 2), burstTarget, verdict(ratio.median <= burstTarget))
}
