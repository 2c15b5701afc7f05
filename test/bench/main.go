// Bench measures what hutch costs over what it is built on. Every figure
// stands beside its floor: the same work on a bare QEMU machine with the same
// options, kernel and disks, and a guest that does nothing else. The two are
// measured in turn, one right after the other, because the speed of a
// processor may change within a minute; what counts is the ratio of a pair.
//
// It starts its own hutchd on a copy of a prepared root, in a directory of its
// own, and leaves no process and no file but its report. It asserts nothing:
// timings are no tests. "make bench" runs it from the top of the source tree.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// plan is how much is measured.
type plan struct {
	Creates    int   `json:"creates"`
	Execs      int   `json:"execs"`
	CLIExecs   int   `json:"cli_execs"`
	Copies     int   `json:"copies"`
	CopyBytes  int64 `json:"copy_bytes"`
	Pauses     int   `json:"pauses"`
	Deaths     int   `json:"deaths"`
	Sandboxes  []int `json:"idle_sandboxes"`
	IdleSec    int   `json:"idle_seconds"`
	MemoryMB   int   `json:"memory_mb"`
	DiskSizeMB int   `json:"disk_size_mb"`
}

func fullPlan() plan {
	return plan{
		Creates: 12, Execs: 150, CLIExecs: 30, Copies: 7, CopyBytes: 32 << 20, Pauses: 200, Deaths: 5,
		Sandboxes: []int{0, 1, 10, 20}, IdleSec: 30, MemoryMB: 128, DiskSizeMB: 5120,
	}
}

// quickPlan is enough to see that the benchmark itself works.
func quickPlan() plan {
	return plan{
		Creates: 2, Execs: 10, CLIExecs: 2, Copies: 2, CopyBytes: 8 << 20, Pauses: 10, Deaths: 2,
		Sandboxes: []int{0, 1}, IdleSec: 3, MemoryMB: 128, DiskSizeMB: 5120,
	}
}

func main() {
	root := flag.String("root", ".cache/root", "prepared `directory` to take kernel, image and template from")
	out := flag.String("out", "docs", "`directory` for benchmarks.md and benchmarks/samples.json")
	quick := flag.Bool("quick", false, "few samples, to try the benchmark itself")
	idle := flag.String("idle", "", "`numbers` of idle sandboxes to look at hutchd with, such as 0,1,10")
	again := flag.Bool("text", false, "measure nothing: write benchmarks.md again from samples.json")
	flag.Parse()
	if *again {
		if err := rewrite(*out); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	p := fullPlan()
	if *quick {
		p = quickPlan()
	}
	if *idle != "" {
		p.Sandboxes = nil
		for _, n := range numbers(strings.ReplaceAll(*idle, ",", " ")) {
			p.Sandboxes = append(p.Sandboxes, int(n))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *root, *out, p)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures everything and writes the report.
func run(ctx context.Context, root, out string, p plan) (err error) {
	scratch, err := os.MkdirTemp("", "hutch-bench-")
	if err != nil {
		return err
	}
	// VMMs run as users of their own and must get to their files.
	if err := os.Chmod(scratch, 0o711); err != nil {
		return errors.Join(err, os.RemoveAll(scratch))
	}
	r := &report{Version: 1, At: time.Now().UTC().Truncate(time.Second), Plan: p, Machine: readMachine()}
	b := &bench{plan: p, report: r, scratch: scratch}
	defer func() { err = errors.Join(err, b.close(), os.RemoveAll(scratch)) }()
	if b.host, err = startDaemon(ctx, scratch, root); err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, part := range []struct {
		name    string
		measure func(context.Context) error
	}{
		{"create", b.measureCreate}, {"a running sandbox", b.measureRunning}, {"deaths", b.measureDeaths}, {"idle", b.measureIdle},
	} {
		say("%s", part.name)
		if err := part.measure(ctx); err != nil {
			return fmt.Errorf("measure %s: %w", part.name, err)
		}
	}
	r.Took = time.Since(r.At).Round(time.Second).String()
	r.Machine.LoadEnd = loadAverage()
	return r.write(out)
}

// bench is one run.
type bench struct {
	plan    plan
	report  *report
	scratch string
	host    *daemon
	bare    barePlan
}

func (b *bench) close() error {
	if b.host == nil {
		return nil
	}
	return b.host.stop()
}

// prepare learns how hutch runs its QEMU from a sandbox that is made once and
// not measured, which also warms the host's caches, and builds the bare guest.
func (b *bench) prepare(ctx context.Context) error {
	say("prepare")
	current, err := os.ReadFile(filepath.Join(b.host.root, "kernels/current"))
	if err != nil {
		return err
	}
	pack := filepath.Join(b.host.root, "kernels", strings.TrimSpace(string(current)))
	initrd, err := buildInitramfs(ctx, b.scratch, pack)
	if err != nil {
		return err
	}
	id, _, err := b.create(ctx)
	if err != nil {
		return err
	}
	record, err := b.host.inspect(ctx, id)
	if err != nil {
		return err
	}
	argv, err := commandLine(int(record.GetVmmPid()))
	if err != nil {
		return err
	}
	kernels, err := filepath.Glob(filepath.Join(pack, "vmlinu[xz]"))
	if err != nil {
		return err
	}
	if len(kernels) != 1 {
		return fmt.Errorf("%d kernels in %s, want one", len(kernels), pack)
	}
	images, err := filepath.Glob(filepath.Join(b.host.root, "images/*/rootfs.ext4"))
	if err != nil {
		return err
	}
	if len(images) != 1 {
		return fmt.Errorf("%d images in %s, want that of the template minimal only", len(images), b.host.root)
	}
	b.bare = barePlan{
		argv: argv, kernel: kernels[0], initrd: initrd, pack: pack, scratch: b.scratch,
		disks: map[string]string{
			"root": images[0], "modules": filepath.Join(pack, "modules.ext4"),
			"data": filepath.Join(b.host.root, "blank", fmt.Sprintf("%d-v1.img", b.plan.DiskSizeMB)),
		},
	}
	if err := b.readGuest(ctx, id); err != nil {
		return err
	}
	warm, err := startBare(ctx, b.bare)
	if err != nil {
		return err
	}
	b.report.Commands = commands{Hutchd: b.host.argv, HutchVMM: argv, BareVMM: warm.argv}
	if err := warm.end(); err != nil {
		return err
	}
	b.report.Versions = b.readVersions(ctx, record)
	return b.host.destroy(ctx, id)
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
