package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

// report is the content of samples.json, version 1. All times are in
// microseconds unless a name says otherwise.
type report struct {
	Version  int            `json:"version"`
	At       time.Time      `json:"at"`
	Took     string         `json:"took"`
	Machine  machine        `json:"machine"`
	Versions versions       `json:"versions"`
	Plan     plan           `json:"plan"`
	Commands commands       `json:"command_lines"`
	Create   []createSample `json:"create"`
	Exec     []sample       `json:"exec"`
	CLIExec  []sample       `json:"cli_exec"`
	Copy     []sample       `json:"copy"`
	CopyGzip []sample       `json:"copy_gzip"`
	Pause    []sample       `json:"pause_resume"`
	Deaths   []int64        `json:"vmm_killed_to_error"`
	Idle     []idleSample   `json:"hutchd_idle"`
	Guest    guestSample    `json:"guest_agent"`

	Contests   []contest     `json:"contests,omitempty"`
	WarmStages []warmStages  `json:"warm_stages,omitempty"`
	Bursts     []burst       `json:"bursts,omitempty"`
	Clones     []clones      `json:"idle_clones,omitempty"`
	Rivals     []rivalReport `json:"others,omitempty"`
}

// sample is one pair, in microseconds.
type sample struct {
	Floor int64 `json:"floor"`
	Hutch int64 `json:"hutch"`
}

func (s sample) ratio() float64 { return float64(s.Hutch) / float64(s.Floor) }

// createSample is a pair of creates and where the time went.
type createSample struct {
	sample
	Stages map[string]int64 `json:"stages"`
	// ServeAt is when the guest agent's server was started, after the guest
	// kernel's start, to 10 ms.
	ServeAt int64 `json:"serve_started_at"`
	// BareBoot is when the bare guest's init began, and had mounted the system's
	// file systems, loaded modules, mounted its root and opened its port.
	BareBoot []int64 `json:"bare_boot"`
}

type machine struct {
	CPU       string `json:"cpu"`
	Cores     int    `json:"cores"`
	Kernel    string `json:"kernel"`
	MemoryKiB int64  `json:"memory_kib"`
	Load      string `json:"load_average_at_start"`
	LoadEnd   string `json:"load_average_at_end"`
}

type versions struct {
	Hutch       string `json:"hutch"`
	Commit      string `json:"commit"`
	Go          string `json:"go"`
	VMM         string `json:"vmm"`
	Accel       string `json:"accel"`
	AccelReason string `json:"accel_reason"`
	GuestKernel string `json:"guest_kernel"`
}

type commands struct {
	Hutchd   []string `json:"hutchd"`
	HutchVMM []string `json:"hutch_vmm"`
	BareVMM  []string `json:"bare_vmm"`
	// BareRestored is the floor of a warm create.
	BareRestored []string `json:"bare_vmm_restored,omitempty"`
}

func readMachine() machine {
	m := machine{Cores: runtime.NumCPU(), Load: loadAverage()}
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	mem, _ := os.ReadFile("/proc/meminfo")
	m.MemoryKiB = field(string(mem), "MemTotal:")
	return m
}

func loadAverage() string {
	b, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(strings.Fields(string(b))[:min(3, len(strings.Fields(string(b))))], " ")
}

func (b *bench) readVersions(ctx context.Context, record *hostagentv1.SandboxRecord) versions {
	v := versions{GuestKernel: record.GetKernelVersion(), Go: runtime.Version()}
	if info, err := b.host.machine.GetHostInfo(ctx, connect.NewRequest(&hostagentv1.GetHostInfoRequest{})); err == nil {
		v.Hutch, v.Accel, v.AccelReason = info.Msg.GetVersion(), info.Msg.GetAccel(), info.Msg.GetAccelReason()
		v.VMM = info.Msg.GetVmm() + " " + info.Msg.GetVmmVersion()
	}
	if out, err := exec.CommandContext(ctx, "git", "rev-parse", "--short", "HEAD").Output(); err == nil {
		v.Commit = strings.TrimSpace(string(out))
	}
	return v
}

// spread is what is told of a list of numbers.
type spread struct{ min, median, max float64 }

func spreadOf[T any](list []T, value func(T) float64) spread {
	if len(list) == 0 {
		return spread{}
	}
	v := make([]float64, len(list))
	for i, s := range list {
		v[i] = value(s)
	}
	slices.SortFunc(v, cmp.Compare)
	median := v[len(v)/2]
	if len(v)%2 == 0 {
		median = (median + v[len(v)/2-1]) / 2
	}
	return spread{v[0], median, v[len(v)-1]}
}

// times writes min, median and max.
func (s spread) format(unit string, scale float64, digits int) string {
	f := func(v float64) string { return fmt.Sprintf("%.*f", digits, v/scale) }
	return f(s.min) + " / **" + f(s.median) + "** / " + f(s.max) + unit
}
