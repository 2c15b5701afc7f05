package qemu_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest"
)

// BenchmarkLaunch measures from the call to running vCPUs, and the end.
func BenchmarkLaunch(b *testing.B) {
	w := newBench(b)
	spec := w.spec(b)
	for b.Loop() {
		v, err := w.driver.Launch(b.Context(), spec)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		end(b, v)
		b.StartTimer()
	}
}

// BenchmarkBoot measures from the call to the guest's first answer, and tells
// what the guest's kernel itself needed and what memory QEMU took beyond the
// guest's.
func BenchmarkBoot(b *testing.B) {
	w := newBench(b)
	spec := w.spec(b)
	spec.Cmdline = "quiet"
	var kernel, over float64
	n := 0
	for b.Loop() {
		v, err := w.driver.Launch(b.Context(), spec)
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
		g, err := vmmtest.DialGuest(ctx, v)
		if err != nil {
			b.Fatal(err)
		}
		answer, err := g.Ask(ctx, "query boot")
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		var init, ready int
		if _, err := fmt.Sscanf(answer, "init=%d ready=%d", &init, &ready); err != nil {
			b.Fatal(err)
		}
		kernel += float64(init)
		over += rssMB(b, v.Machine().Process.PID) - float64(spec.MemoryMB)
		n++
		g.Close()
		cancel()
		end(b, v)
		b.StartTimer()
	}
	b.ReportMetric(kernel/float64(n), "kernel-ms/op")
	b.ReportMetric(over/float64(n), "rss-minus-guest-MB")
}

func rssMB(t testing.TB, pid int) float64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			kb, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return float64(kb) / 1024
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// BenchmarkSnapshot measures a save, a restore until the machine stands, from
// there to the guest's first answer, and what an idle copy costs in memory.
func BenchmarkSnapshot(b *testing.B) {
	for _, mb := range []int{128, 512} {
		b.Run(fmt.Sprintf("%dMB", mb), func(b *testing.B) { benchSnapshot(b, mb) })
	}
}

func benchSnapshot(b *testing.B, mb int) {
	w := newBench(b)
	spec := w.spec(b)
	spec.MemoryMB = mb
	from, stats := w.saveGuest(b, spec)
	sums := map[string]float64{}
	n := 0
	for b.Loop() {
		n++
		begin := time.Now()
		v, err := w.driver.Restore(b.Context(), spec, from)
		if err != nil {
			b.Fatal(err)
		}
		sums["restore-ms"] += ms(time.Since(begin))
		begin = time.Now()
		if err := v.Resume(b.Context()); err != nil {
			b.Fatal(err)
		}
		sums["resume-ms"] += ms(time.Since(begin))
		answer(b, b.Context(), v, "echo up")
		sums["first-answer-ms"] += ms(time.Since(begin))
		b.StopTimer()
		for name, v := range memoryMB(b, v.Machine().Process.PID) {
			sums[name] += v
		}
		if err := v.Pause(b.Context()); err != nil {
			b.Fatal(err)
		}
		_, again := saveVM(b, b.Context(), v, spec)
		sums["copy-state-save-ms"] += ms(again.StateTime)
		sums["copy-memory-save-ms"] += ms(again.MemoryTime)
		end(b, v)
		b.StartTimer()
	}
	for name, sum := range sums {
		b.ReportMetric(sum/float64(n), name)
	}
	b.ReportMetric(ms(stats.StateTime), "state-save-ms")
	b.ReportMetric(ms(stats.MemoryTime), "memory-save-ms")
	b.ReportMetric(float64(stats.StateBytes)/1024, "state-KB")
	b.ReportMetric(float64(stats.MemoryBytes)/(1<<20), "memory-MB")
}

// BenchmarkIdleCopies measures what each of ten copies of one machine costs in
// memory, after its guest has answered once.
func BenchmarkIdleCopies(b *testing.B) {
	const copies = 10
	w := newBench(b)
	spec := w.spec(b)
	from, _ := w.saveGuest(b, spec)
	sums := map[string]float64{}
	n := 0
	for b.Loop() {
		var vms []vmm.VM
		for range copies {
			v, err := w.driver.Restore(b.Context(), w.spec(b), from)
			if err != nil {
				b.Fatal(err)
			}
			vms = append(vms, v)
			if err := v.Resume(b.Context()); err != nil {
				b.Fatal(err)
			}
			answer(b, b.Context(), v, "echo up")
		}
		b.StopTimer()
		for _, v := range vms {
			n++
			for name, mb := range memoryMB(b, v.Machine().Process.PID) {
				sums[name] += mb
			}
		}
		for _, v := range vms {
			end(b, v)
		}
		b.StartTimer()
	}
	for name, sum := range sums {
		b.ReportMetric(sum/float64(n), name)
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// memoryMB tells what a process costs: its share of all it maps, what nobody
// else has, and that of it which is guest memory.
func memoryMB(t testing.TB, pid int) map[string]float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string]float64{}
	guest := false
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if strings.Contains(f[0], "-") {
			guest = strings.Contains(line, "/memfd:")
			continue
		}
		kb, err := strconv.Atoi(f[1])
		if err != nil {
			continue
		}
		switch f[0] {
		case "Pss:":
			sums["pss-MB"] += float64(kb) / 1024
		case "Private_Clean:", "Private_Dirty:":
			sums["private-MB"] += float64(kb) / 1024
		case "Anonymous:":
			if guest {
				sums["guest-own-MB"] += float64(kb) / 1024
			}
		}
	}
	return sums
}
