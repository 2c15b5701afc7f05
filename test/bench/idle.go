package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// idleSample is hutchd with a number of sandboxes that do nothing.
type idleSample struct {
	Sandboxes int   `json:"sandboxes"`
	Seconds   int   `json:"seconds"`
	RSSKiB    int64 `json:"rss_kib"`
	PSSKiB    int64 `json:"pss_kib"`
	Ticks     int64 `json:"cpu_ticks"`  // of 10 ms, user and system
	CPU       int64 `json:"cpu_micros"` // by the scheduler's own count
	Switches  int64 `json:"context_switches"`
}

// guestSample is the guest agent in a sandbox, and its file.
type guestSample struct {
	InitRSSKiB   int64 `json:"init_rss_kib"`
	InitPSSKiB   int64 `json:"init_pss_kib"`
	ServeRSSKiB  int64 `json:"serve_rss_kib"`
	ServePSSKiB  int64 `json:"serve_pss_kib"`
	BinaryBytes  int64 `json:"binary_bytes"`
	InitrdBytes  int64 `json:"initrd_bytes"`
	BareInitrd   int64 `json:"bare_initrd_bytes"`
	MemFreeKiB   int64 `json:"guest_mem_available_kib"`
	MemTotalKiB  int64 `json:"guest_mem_total_kib"`
	ServeThreads int64 `json:"serve_threads"`
}

// measureIdle makes more and more sandboxes and looks at the daemon.
func (b *bench) measureIdle(ctx context.Context) error {
	var ids []string
	for _, n := range b.plan.Sandboxes {
		for len(ids) < n {
			id, _, err := b.create(ctx, true)
			if err != nil {
				return err
			}
			ids = append(ids, id)
		}
		s, err := b.idle(ctx, n)
		if err != nil {
			return err
		}
		b.report.Idle = append(b.report.Idle, s)
		say("  %d sandboxes: hutchd %.1f MiB resident, %d ticks in %d s", n, float64(s.RSSKiB)/1024, s.Ticks, s.Seconds)
	}
	if len(ids) > 0 {
		// One that has lain idle for a while is what is asked about.
		if err := b.readGuest(ctx, ids[0]); err != nil {
			return err
		}
	}
	for _, id := range ids {
		if err := b.host.destroy(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// idle lets some seconds go by without a call and reads what hutchd used.
func (b *bench) idle(ctx context.Context, n int) (idleSample, error) {
	s := idleSample{Sandboxes: n, Seconds: b.plan.IdleSec}
	// What the last create left to do in the background is not idleness.
	if err := delay.For(ctx, 3*time.Second); err != nil {
		return s, err
	}
	pid := b.host.cmd.Process.Pid
	before, err := readUse(pid)
	if err != nil {
		return s, err
	}
	if err := delay.For(ctx, time.Duration(s.Seconds)*time.Second); err != nil {
		return s, err
	}
	after, err := readUse(pid)
	if err != nil {
		return s, err
	}
	s.Ticks, s.CPU, s.Switches = after.ticks-before.ticks, after.micros-before.micros, after.switches-before.switches
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return s, err
	}
	s.RSSKiB, s.PSSKiB = field(string(text), "Rss:"), field(string(text), "Pss:")
	return s, nil
}

// use is the processor time of a process since its start.
type use struct{ ticks, micros, switches int64 }

func readUse(pid int) (use, error) {
	var u use
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	if f := strings.Fields(rest); len(f) > 12 { // utime and stime, see proc(5)
		for _, s := range f[11:13] {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				return u, fmt.Errorf("processor time of %d: %w", pid, err)
			}
			u.ticks += n
		}
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return u, err
	}
	for _, t := range threads {
		status, err := os.ReadFile(filepath.Join(t, "status"))
		if err != nil {
			continue // it ended
		}
		u.switches += field(string(status), "voluntary_ctxt_switches:") + field(string(status), "nonvoluntary_ctxt_switches:")
		if sched, err := os.ReadFile(filepath.Join(t, "schedstat")); err == nil {
			u.micros += numbers(string(sched))[0] / 1000
		}
	}
	return u, nil
}

// field returns the number after a name at the start of a line, or 0.
func field(text, name string) int64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			if n := numbers(rest); len(n) > 0 {
				return n[0]
			}
		}
	}
	return 0
}

// readGuest looks at the guest agent from inside a sandbox.
func (b *bench) readGuest(ctx context.Context, id string) error {
	g := &b.report.Guest
	for _, p := range []struct {
		pid      string
		rss, pss *int64
	}{{"1", &g.InitRSSKiB, &g.InitPSSKiB}, {"$(pidof hutch-agent)", &g.ServeRSSKiB, &g.ServePSSKiB}} {
		out, err := b.host.exec(ctx, id, "sh", "-c", fmt.Sprintf("cat /proc/%s/smaps_rollup /proc/%s/status /proc/meminfo", p.pid, p.pid))
		if err != nil {
			return err
		}
		*p.rss, *p.pss = field(out, "Rss:"), field(out, "Pss:")
		g.ServeThreads = field(out, "Threads:")
		g.MemFreeKiB, g.MemTotalKiB = field(out, "MemAvailable:"), field(out, "MemTotal:")
	}
	for path, size := range map[string]*int64{
		"bin/hutch-agent": &g.BinaryBytes, b.bare.initrd: &g.BareInitrd,
		filepath.Join(b.bare.pack, "initrd.cpio"): &g.InitrdBytes,
	} {
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		*size = fi.Size()
	}
	return nil
}
