package qemu

import (
	"encoding/json"
	"fmt"

	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/proc"
)

// ending is all that is known about the end of a QEMU.
type ending struct {
	shutdown string // reason of the SHUTDOWN event, "": none was seen
	panic    string // the kernel's last message
	unseen   bool   // nobody watched: exit and panic are not known
	killed   bool   // Kill was called
	exit     proc.Exit
	words    string // QEMU's last
	oomKills int
	memoryMB int // of the cgroup
}

// shutdownReason returns the reason of a SHUTDOWN event, and "" for any other
// event. The reasons are QEMU's ShutdownCause.
func shutdownReason(e qmp.Event) string {
	if e.Name != "SHUTDOWN" {
		return ""
	}
	var data struct {
		Reason string `json:"reason"`
	}
	if json.Unmarshal(e.Data, &data) != nil || len(data.Reason) > 64 {
		return ""
	}
	return data.Reason
}

// stoppedForRoom tells whether an event says that QEMU stops the guest because
// there is no room on the host for what it writes: werror=enospc of the disks.
func stoppedForRoom(e qmp.Event) bool {
	if e.Name != "BLOCK_IO_ERROR" {
		return false
	}
	var data struct {
		Action  string `json:"action"`
		NoSpace bool   `json:"nospace"`
	}
	return json.Unmarshal(e.Data, &data) == nil && data.Action == "stop" && data.NoSpace
}

// classify says why a machine ended. What the guest did first counts, then
// what was done to QEMU.
func classify(e ending) vmm.Exit {
	status := "QEMU " + e.exit.String()
	if e.unseen && e.words != "" {
		status += ", its log ends in"
	}
	if e.words != "" {
		status += ": " + e.words
	}
	switch {
	case e.shutdown == "guest-reset" && e.panic != "", e.shutdown == "guest-panic":
		return vmm.Exit{Reason: vmm.GuestPanic, Detail: orElse(e.panic, status)}
	case e.shutdown == "guest-shutdown":
		return vmm.Exit{Reason: vmm.GuestPowerOff, Detail: status}
	case e.shutdown == "guest-reset" && e.unseen:
		// A kernel that panicked says why on the console only.
		return vmm.Exit{Reason: vmm.GuestReset, Detail: "or its kernel panicked; " + status}
	case e.shutdown == "guest-reset":
		return vmm.Exit{Reason: vmm.GuestReset, Detail: status}
	case e.killed:
		return vmm.Exit{Reason: vmm.Killed, Detail: status}
	case e.oomKills > 0:
		return vmm.Exit{Reason: vmm.Crashed, Detail: fmt.Sprintf("the host ended QEMU because it needed more than its %d MB of memory; %s", e.memoryMB, status)}
	case e.shutdown != "":
		status += " (" + proc.Printable(e.shutdown) + ")"
	}
	return vmm.Exit{Reason: vmm.Crashed, Detail: status}
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
