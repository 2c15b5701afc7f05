package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/delay"
)

// burst is many creates at once, each followed by an exec, and what such a
// create costs alone. Microseconds.
type burst struct {
	// OneVMM and OneHutchd is the processor time, user and system, that one
	// create and exec takes alone: of the VMM until the exec's result, and
	// hutchd's share of a row of them with all that it does behind them.
	OneVMM    []int64 `json:"one_vmm_cpu"`
	OneHutchd int64   `json:"one_hutchd_cpu"`

	AtOnce int     `json:"at_once"`
	Failed int     `json:"failed"`
	Booted int     `json:"booted"` // made, but by a boot, since the copy did not work
	Wall   int64   `json:"wall"`   // until the last had its result
	Each   []int64 `json:"each"`   // to the result of each
}

// one is the processor time of one create and exec.
func (b burst) one() float64 {
	return spreadOf(b.OneVMM, func(t int64) float64 { return float64(t) }).median + float64(b.OneHutchd)
}

// ratio is the wall time over what the processor time of all takes on the cores.
func (b burst) ratio(cores int) float64 {
	return float64(b.Wall) / (float64(b.AtOnce) * b.one() / float64(cores))
}

// fellBack is the stage of a warm create that became a boot.
const fellBack = "warm start failed"

// settle is how long hutchd has to do what it does behind a create.
const settle = 2 * time.Second

func (b *bench) measureBurst(ctx context.Context) error {
	if err := b.prepareWarm(ctx); err != nil {
		return err
	}
	for range b.plan.Bursts {
		s := burst{AtOnce: b.plan.AtOnce}
		if err := b.alone(ctx, &s); err != nil {
			return err
		}
		if err := b.atOnce(ctx, &s); err != nil {
			return err
		}
		b.report.Bursts = append(b.report.Bursts, s)
		say("  %d at once: %.2f s, %d failed, %d booted instead; one alone takes %.0f ms of processor; ratio %.2f", s.AtOnce, float64(s.Wall)/1e6, s.Failed, s.Booted,
			s.one()/1e3, s.ratio(b.report.Machine.Cores))
	}
	return nil
}

// alone makes some sandboxes one after the other and sees what each costs.
func (b *bench) alone(ctx context.Context, s *burst) (err error) {
	if err := delay.For(ctx, settle); err != nil {
		return err
	}
	hutchd := b.host.cmd.Process.Pid
	before, err := processorTime(hutchd)
	if err != nil {
		return err
	}
	var ids []string
	defer func() { err = errors.Join(err, b.destroyAll(ctx, ids)) }()
	for range b.plan.Alone {
		id, _, err := b.create(ctx, false)
		if err != nil {
			return err
		}
		ids = append(ids, id)
		if _, err := b.host.exec(ctx, id, "/bin/true"); err != nil {
			return err
		}
		record, err := b.host.inspect(ctx, id)
		if err != nil {
			return err
		}
		used, err := processorTime(int(record.GetVmmPid()))
		if err != nil {
			return err
		}
		s.OneVMM = append(s.OneVMM, micros(used))
	}
	if err := delay.For(ctx, settle); err != nil {
		return err
	}
	after, err := processorTime(hutchd)
	s.OneHutchd = micros(after-before) / int64(len(ids))
	return err
}

// atOnce makes all sandboxes at the same time.
func (b *bench) atOnce(ctx context.Context, s *burst) error {
	type result struct {
		id   string
		made createSample
		took time.Duration
		err  error
	}
	results := make([]result, s.AtOnce)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range results {
		wg.Go(func() {
			r := &results[i]
			if r.id, r.made, r.err = b.create(ctx, false); r.err == nil {
				_, r.err = b.host.exec(ctx, r.id, "/bin/true")
			}
			r.took = time.Since(began)
		})
	}
	wg.Wait()
	s.Wall = micros(time.Since(began))
	var ids []string
	for _, r := range results {
		if r.err != nil {
			s.Failed++
			say("  one of %d at once: %v", s.AtOnce, r.err)
		} else {
			s.Each = append(s.Each, micros(r.took))
		}
		if _, ok := r.made.Stages[fellBack]; ok {
			s.Booted++
		}
		if r.id != "" {
			ids = append(ids, r.id)
		}
	}
	return b.destroyAll(ctx, ids)
}

func (b *bench) destroyAll(ctx context.Context, ids []string) error {
	var errs []error
	for _, id := range ids {
		errs = append(errs, b.host.destroy(ctx, id))
	}
	return errors.Join(errs...)
}

// processorTime is what a process has used, user and system, its ended threads
// too: the clock that clock_getcpuclockid(3) names.
func processorTime(pid int) (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil { //nolint:gosec // a pid has 22 bits
		return 0, fmt.Errorf("processor time of %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}
