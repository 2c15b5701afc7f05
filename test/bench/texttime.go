package main

import (
	"fmt"
	"slices"
)

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
		{"warm create to the result of its first exec", r.contest(createToExec).pairs(sideFloor, sideHutch), " ms", 1e3, warmTarget},
		{"the same that takes a spare, started ahead of it", r.contest(spareContest).pairs(sideFloor, sideHutch), " ms", 1e3, warmTarget},
		{"hibernate, API call to reply", r.contest(sleepContest).pairs(sideFloor, sideHutch), " ms", 1e3, 0},
		{"resume to the result of its first exec", r.contest(wakeContest).pairs(sideFloor, sideHutch), " ms", 1e3, 0},
		{"fork of a running sandbox to the result of the copy's first exec", r.contest(forkContest).pairs(sideFloor, sideHutch), " ms", 1e3, 0},
		{"the same, how long the source stands still", r.contest(stillContest).pairs(sideFloor, sideHutch), " ms", 1e3, 0},
	} {
		if len(row.samples) == 0 {
			continue // not measured, or samples of a time before that was
		}
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
		if len(row.samples) == 0 {
			continue
		}
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
	line("- **pause and resume**: `stop` and `cont` over QMP. hutch also writes the state to its record on disk, twice, and tells its events.")
	if len(r.Contests) > 0 {
		r.copyFloors(line)
	}
	line("")
}

func (r *report) copyFloors(line liner) {
	line("- **warm create**: QEMU started with the devices of a bare machine that stood still, as hutch's own copies are (`xen-save-devices-state`, `-incoming`), on a private mapping of its")
	line("  memory, which is in RAM, sealed, and has holes where it was zero. Its data disk is copied before the clock starts. The clock runs from the start of the process to the answer to `exec /bin/true`,")
	line("  which the machine had run once before it was written down, as hutch's template has.")
	line("  hutch's side is a hutchd with `spares = 0`, as in all other rows: it does all its work while the caller waits. With a spare, hutchd's default, most of it was done before; what the spare")
	line("  itself takes shows in no time here, and it is ready again before the next side has its turn.")
	line("- **hibernate**: `stop`, the devices and the memory that is not zero written to the disk of the sandboxes, `fsync`, and the end of the process. No digests.")
	line("- **resume**: QEMU started on a private mapping of that file, to the answer to its first exec. Nothing is checked.")
	line("- **fork**: `stop`, the devices, the memory that is not zero into RAM, a copy of the data disk, `cont`; then QEMU started from that as for a warm create. No pause of the guest's own.")
	line("- **idle clones**: copies of that bare machine, which have run `/bin/true` once.")
}

func (r *report) createText(line liner) {
	if len(r.Create) == 0 {
		return
	}
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
