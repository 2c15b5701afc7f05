package main

import (
	"fmt"
	"strings"
)

// rivalsText tells what people use instead.
func (r *report) rivalsText(line liner) {
	if len(r.Rivals) == 0 {
		return
	}
	line("## Beside what others use\n")
	line("On the same machine, in the same rounds. The last column is how many times as long as hutch each takes, by the median of the rounds.\n")
	line("| what | who | rounds | time | times hutch's |\n|---|---|---|---|---|")
	for _, name := range []string{rivalStart, rivalExec, rivalSleep, rivalWake} {
		c := r.contest(name)
		what, _, _ := strings.Cut(name, ",")
		for _, side := range c.Sides {
			times, ratio := c.times(side), ""
			if len(times) == 0 {
				continue
			}
			if side != sideHutch {
				ratio = fmt.Sprintf("%.2f", spreadOf(c.pairs(sideHutch, side), sample.ratio).median)
			}
			line("| %s | %s | %d | %s | %s |", what, side, len(times), spreadOf(times, asFloat).format(" ms", 1e3, 1), ratio)
		}
	}
	line("\n- **hutch**: a warm create and an exec, cold where it says so; an exec; hibernation and waking. API call to reply.")
	for _, v := range r.Rivals {
		if v.LeftOut != "" {
			line("- **%s** is left out: %s", v.Name, strings.ReplaceAll(v.LeftOut, "\n", "; "))
			continue
		}
		line("- **%s** (%s): %s", v.Name, strings.Join(v.Versions, ", "), rivalWord(v.Name))
	}
	line("")
}

// rivalWord says what one does in the rounds.
func rivalWord(name string) string {
	switch name {
	case rivalLibvirt:
		return "a machine of the same kernel, initramfs, memory, processor and image, with QEMU's guest agent in the place of the bare loop, by a `libvirtd` that has no network and no cgroups. " +
			"One `virsh` is told everything: `start`, `save`, `restore`, and `guest-exec` of `/bin/true`, whose end has to be asked for. Nothing checks what it saves."
	case rivalPodman:
		return "no isolation but the kernel's own: a container of the template's files, `--network none`, on overlay. `podman run --rm` and `podman exec` of `/bin/true`, process start to exit."
	}
	return ""
}
