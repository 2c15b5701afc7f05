package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/disk"
	"github.com/hutch-run/hutch/internal/host/lifecycle"
	"github.com/hutch-run/hutch/internal/host/network"
	"github.com/hutch-run/hutch/internal/host/rpc"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/version"
)

// host is this machine as the API shows it.
type host struct {
	p       *parts
	started time.Time
}

var _ rpc.Host = host{}

// Info tells versions, capacity and use.
func (h host) Info(context.Context) (rpc.HostInfo, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return rpc.HostInfo{}, fmt.Errorf("uname: %w", err)
	}
	memory, err := readMemory()
	if err != nil {
		return rpc.HostInfo{}, err
	}
	free, err := freeDisk(h.p.cfg.Root)
	if err != nil {
		return rpc.HostInfo{}, err
	}
	pack, err := h.p.kernels.Current()
	if err != nil {
		return rpc.HostInfo{}, err
	}
	caps := h.p.driver.Caps()
	used, total := h.p.network.Usage()
	return rpc.HostInfo{
		Version: version.Version, Kernel: unix.ByteSliceToString(u.Release[:]), Arch: unix.ByteSliceToString(u.Machine[:]),
		VMM: caps.Name, VMMVersion: caps.Version, Accel: caps.Accel, AccelReason: caps.AccelReason,
		KernelID: pack.ID + " (" + pack.Release + ")", CPUs: runtime.NumCPU(),
		MemoryBytes: memory.total, MemoryAvailable: memory.available, DiskAvailable: free,
		SlotsUsed: used, SlotsTotal: total, Root: h.p.cfg.Root, StartedAt: h.started,
	}, nil
}

// Diagnose asks every part whether the host gives it what it needs.
func (h host) Diagnose(ctx context.Context) ([]rpc.Check, error) {
	checks := []rpc.Check{h.accelCheck(), h.diskCheck(), h.memoryCheck(), h.templateCheck(), h.shareCheck(), programCheck("mkfs.ext4", "e2fsprogs")}
	for _, f := range network.Check(ctx, network.Params{Root: h.p.cfg.Root, Dir: filepath.Join(h.p.cfg.RunDir, "netns")}) {
		checks = append(checks, rpc.Check{Name: "network " + f.Name, Result: string(f.Level), Detail: f.Detail, Advice: f.Advice})
	}
	for _, q := range h.p.sandboxes.Quarantined() {
		checks = append(checks, rpc.Check{
			Name: "sandbox " + q.Name, Result: "problem", Detail: q.Err.Error(),
			Advice: "its record can't be read; nothing of it was touched. Mend or move away " + q.Dir + " and restart hutchd",
		})
	}
	return checks, nil
}

func (h host) accelCheck() rpc.Check {
	caps := h.p.driver.Caps()
	c := rpc.Check{Name: "vmm", Result: "ok", Detail: fmt.Sprintf("%s %s with %s: %s", caps.Name, caps.Version, caps.Accel, caps.AccelReason)}
	if caps.Accel != "kvm" {
		c.Result = "warning"
		c.Advice = "sandboxes run by emulation, many times slower; use a host with hardware virtualization, or enable it (nested) for this one"
	}
	return c
}

func (h host) diskCheck() rpc.Check {
	c := rpc.Check{Name: "disk", Result: "ok"}
	free, err := freeDisk(h.p.cfg.Root)
	switch {
	case err != nil:
		c.Result, c.Detail = "problem", err.Error()
	case free < int64(h.p.cfg.Limits.MinFreeDiskMB)<<20:
		c.Result, c.Advice = "problem", "creates are refused until there is more; destroy sandboxes or move the root to a larger disk"
		fallthrough
	default:
		c.Detail = fmt.Sprintf("%d MiB free in %s", free>>20, h.p.cfg.Root)
	}
	return c
}

func (h host) memoryCheck() rpc.Check {
	c := rpc.Check{Name: "memory", Result: "ok"}
	m, err := readMemory()
	switch {
	case err != nil:
		c.Result, c.Detail = "problem", err.Error()
	case m.available < int64(h.p.cfg.Limits.MinFreeMemoryMB+sandbox.DefaultMemoryMB)<<20:
		c.Result, c.Advice = "warning", "there is no room for one more sandbox of the default size"
		fallthrough
	default:
		c.Detail = fmt.Sprintf("%d of %d MiB available", m.available>>20, m.total>>20)
	}
	return c
}

func (h host) templateCheck() rpc.Check {
	if _, _, err := h.p.templates.Resolve(sandbox.DefaultTemplate); err != nil {
		return rpc.Check{Name: "template", Result: "problem", Detail: err.Error(), Advice: "run hutchd setup, or hutch template build " + sandbox.DefaultTemplate}
	}
	return rpc.Check{Name: "template", Result: "ok", Detail: sandbox.DefaultTemplate + " is there"}
}

// shareCheck looks for what shares need only where some are allowed.
func (h host) shareCheck() rpc.Check {
	allowed := h.p.cfg.Shares.Allow
	if len(allowed) == 0 {
		return rpc.Check{Name: "shares", Result: "ok", Detail: "no directory of the host is allowed"}
	}
	if err := h.p.shares.Missing(); err != nil {
		return rpc.Check{Name: "shares", Result: "problem", Detail: err.Error(), Advice: "install it and restart hutchd, or take [shares] allow out of its configuration"}
	}
	return rpc.Check{Name: "shares", Result: "ok", Detail: "allowed below " + strings.Join(allowed, ", ")}
}

func programCheck(name, debian string) rpc.Check {
	path, err := exec.LookPath(name)
	if err != nil {
		return rpc.Check{Name: name, Result: "problem", Detail: err.Error(), Advice: "apt-get install " + debian}
	}
	return rpc.Check{Name: name, Result: "ok", Detail: path}
}

// stats measures what one sandbox uses now.
func (p *parts) stats(ctx context.Context, id sandbox.ID) (rpc.Stats, error) {
	v, err := p.sandboxes.Get(string(id))
	if err != nil {
		return rpc.Stats{}, err
	}
	var s rpc.Stats
	if v.Pid > 0 {
		if s, err = processStats(v.Pid); err != nil {
			return s, err
		}
	}
	if s.Disk, err = disk.Allocated(p.store.DataDisk(v.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return s, err
	}
	if v.Slot > 0 {
		t, err := p.network.Stats(ctx, v.Slot)
		if err != nil {
			return s, err
		}
		s.RxBytes, s.TxBytes, s.RxPackets, s.TxPackets = int64(t.RxBytes), int64(t.TxBytes), int64(t.RxPackets), int64(t.TxPackets)
	}
	s.GuestUsed = p.guestMemory(ctx, v)
	return s, nil
}

// processStats reads a VMM's CPU time and memory. One that just ended has
// none.
func processStats(pid int) (rpc.Stats, error) {
	var s rpc.Stats
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if gone(err) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	// The second field is a name in brackets that may hold anything.
	_, rest, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')'):]), " ")
	if f := strings.Fields(rest); len(f) > 12 {
		for _, ticks := range f[11:13] { // utime, stime
			n, _ := strconv.ParseInt(ticks, 10, 64)
			s.CPU += time.Duration(n) * (time.Second / 100)
		}
	}
	m, err := procTable(filepath.Join(dir, "smaps_rollup"))
	if gone(err) {
		return s, nil
	}
	s.RSS, s.PSS = m["Rss"], m["Pss"]
	return s, err
}

func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

// guestMemory asks the guest, and gives up soon: a guest that does not answer
// must not hold up what the host knows by itself.
func (p *parts) guestMemory(ctx context.Context, v lifecycle.View) int64 {
	if v.State != sandbox.Running {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	used, _, err := p.sandboxes.Memory(ctx, v.ID)
	if err != nil {
		p.log.Debug("ask for guest memory", "sandbox_id", v.ID, "error", err)
	}
	return int64(used)
}
