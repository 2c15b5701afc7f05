package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// clones is what a number of idle machines that are copies of one cost, each
// side alone on the host.
type clones struct {
	Side  string `json:"side"`
	Count int    `json:"count"`
	Each  []rss  `json:"each"`
}

// rss is the memory of a VMM in KiB.
type rss struct {
	PSS int64 `json:"pss"`
	// Private is what nobody else has; Guest is that of it which is the guest's
	// memory, and Code that which is code that an emulating VMM has translated.
	Private int64 `json:"private"`
	Guest   int64 `json:"guest"`
	Code    int64 `json:"code"`
}

func (c clones) median(of func(rss) int64) float64 {
	return spreadOf(c.Each, func(m rss) float64 { return float64(of(m)) }).median
}

func pssOf(m rss) int64     { return m.PSS }
func privateOf(m rss) int64 { return m.Private }
func guestOf(m rss) int64   { return m.Guest }
func codeOf(m rss) int64    { return m.Code }

// rest is how long machines are left alone before their memory is read.
const rest = 3 * time.Second

// measureClones starts more and more copies of the warm template, and then of
// the bare machine, and reads what they cost after each has run a program once.
func (b *bench) measureClones(ctx context.Context) error {
	if err := b.prepareWarm(ctx); err != nil {
		return err
	}
	var ids []string
	err := b.growClones(ctx, sideHutch, func() (int, error) {
		id, _, err := b.create(ctx, false)
		if err != nil {
			return 0, err
		}
		ids = append(ids, id)
		if _, err := b.host.exec(ctx, id, "/bin/true"); err != nil {
			return 0, err
		}
		record, err := b.host.inspect(ctx, id)
		return int(record.GetVmmPid()), err
	})
	if err := errors.Join(err, b.destroyAll(ctx, ids)); err != nil {
		return err
	}
	var machines []*bare
	err = b.growClones(ctx, sideFloor, func() (int, error) {
		m, err := b.restoreBare(ctx)
		if err != nil {
			return 0, err
		}
		machines = append(machines, m)
		return m.cmd.Process.Pid, nil
	})
	for _, m := range machines {
		err = errors.Join(err, m.end())
	}
	return err
}

func (b *bench) growClones(ctx context.Context, side string, start func() (pid int, err error)) error {
	var pids []int
	for _, n := range b.plan.Clones {
		for len(pids) < n {
			pid, err := start()
			if err != nil {
				return err
			}
			pids = append(pids, pid)
		}
		if err := delay.For(ctx, rest); err != nil {
			return err
		}
		c := clones{Side: side, Count: n}
		for _, pid := range pids {
			m, err := memoryOf(pid)
			if err != nil {
				return err
			}
			c.Each = append(c.Each, m)
		}
		b.report.Clones = append(b.report.Clones, c)
		say("  %s, %d clones: PSS %.1f MiB each, private %.1f", side, n, c.median(pssOf)/1024, c.median(privateOf)/1024)
	}
	return nil
}

// memoryOf reads a VMM's memory, see smaps in proc(5). Guest memory is a memory
// file; only translated code can be both written and run.
func memoryOf(pid int) (rss, error) {
	var m rss
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return m, err
	}
	guest, code := false, false
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if strings.Contains(name, "-") { // the first line of a mapping
			guest, code = strings.Contains(line, "/memfd:"), strings.Contains(line, " rwxp ")
			continue
		}
		kib := numbers(value)
		if len(kib) == 0 {
			continue
		}
		switch name {
		case "Pss":
			m.PSS += kib[0]
		case "Private_Clean", "Private_Dirty":
			m.Private += kib[0]
			switch {
			case guest:
				m.Guest += kib[0]
			case code:
				m.Code += kib[0]
			}
		}
	}
	return m, nil
}

// clonesOf returns those of a side and a number; nil: not measured.
func (r *report) clonesOf(side string, n int) *clones {
	for i, c := range r.Clones {
		if c.Side == side && c.Count == n {
			return &r.Clones[i]
		}
	}
	return nil
}
