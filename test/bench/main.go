// Bench measures what hutch costs over what it is built on. Every figure
// stands beside its floor: the same work on a bare QEMU machine with the same
// options, kernel and disks, and a guest that does nothing else. The two are
// measured in turn, one right after the other, because the speed of a
// processor may change within a minute; what counts is the ratio of a pair.
//
// What people use instead on such a machine, libvirt and podman, takes part in
// some of it; a missing one's Debian packages are installed, and it is left out
// when it can't run.
//
// It starts its own hutchd on a copy of a prepared root, in a directory of its
// own, and leaves no process and no file but its report and those packages. It asserts nothing:
// timings are no tests. "make bench" runs it from the top of the source tree.
package main

import (
	"cmp"
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

// Where a report goes: one of a whole run stands for the project, another is for
// the one who made it.
const (
	wholeOut = "docs"
	partOut  = ".cache/bench-part"
)

func main() {
	root := flag.String("root", ".cache/root", "prepared `directory` to take kernel, image and template from")
	out := flag.String("out", "", "`directory` for benchmarks.md and benchmarks/; default docs, .cache/bench-part for less than all")
	rows := flag.String("rows", "", "`names` of rows, such as warm,memory; default all")
	quick := flag.Bool("quick", false, "few samples, to try the benchmark itself")
	idle := flag.String("idle", "", "`numbers` of idle sandboxes to look at hutchd with, such as 0,1,10")
	again := flag.Bool("text", false, "measure nothing: write benchmarks.md again from samples.json")
	flag.Parse()
	if *again {
		if err := rewrite(cmp.Or(*out, wholeOut)); err != nil {
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
	to := wholeOut
	if *rows != "" {
		p.Rows = strings.Split(*rows, ",")
	}
	if *rows != "" || *quick {
		to = partOut
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *root, cmp.Or(*out, to), p)
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
	b := &bench{plan: p, report: r, scratch: scratch, prepared: root}
	defer func() { err = errors.Join(err, b.close(), os.RemoveAll(scratch)) }()
	rows, err := b.chosen()
	if err != nil {
		return err
	}
	// Without spares a create does all its work while its caller waits, and nothing
	// goes on behind what is measured next.
	if b.host, err = startDaemon(ctx, scratch, root, 0); err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, row := range rows {
		say("%s", row.name)
		if err := row.measure(ctx); err != nil {
			return fmt.Errorf("measure %s: %w", row.name, err)
		}
	}
	r.Took = time.Since(r.At).Round(time.Second).String()
	r.Machine.LoadEnd = loadAverage()
	say("write %s", filepath.Join(out, "benchmarks.md"))
	return r.write(out)
}

// bench is one run.
type bench struct {
	plan     plan
	report   *report
	scratch  string
	prepared string // root
	host     *daemon
	bare     barePlan
	saved    *bareSaved // what restored machines are made from; nil: not made yet
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
	id, _, err := b.create(ctx, true)
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
	image := filepath.Join(b.host.root, "images", strings.TrimPrefix(record.GetImageDigest(), "sha256:"), "rootfs.ext4")
	b.bare = barePlan{
		argv: argv, kernel: kernels[0], initrd: initrd, pack: pack, scratch: b.scratch, memory: int64(b.plan.MemoryMB) << 20,
		disks: map[string]string{
			"root": image, "modules": filepath.Join(pack, "modules.ext4"),
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
