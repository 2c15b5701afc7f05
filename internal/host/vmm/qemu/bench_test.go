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
