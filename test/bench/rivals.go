package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Names of contests with what people use instead.
const (
	rivalStart = "start to the first result, beside others"
	rivalExec  = "exec of true, beside others"
	rivalSleep = "save and end, beside others"
	rivalWake  = "restore to the first result, beside others"
)

// Names of rivals.
const (
	rivalLibvirt = "libvirt"
	rivalPodman  = "podman"
)

// rivalEnd is how long the processes that one leaves behind may take to end.
const rivalEnd = 20 * time.Second

// rival is something that people use instead of hutch on such a machine, ready
// to take part.
type rival struct {
	starts []side // rivalStart
	execs  []side // rivalExec
	sleeps []side // rivalSleep and rivalWake
	end    func() error
}

// rivalReport says what took part, or why it did not.
type rivalReport struct {
	Name     string     `json:"name"`
	Versions []string   `json:"versions,omitempty"`
	Commands [][]string `json:"commands,omitempty"`
	LeftOut  string     `json:"left_out,omitempty"`
}

// measureRivals has hutch and the others take part in the same rounds. One that
// can't be had here is left out, and the report says why.
func (b *bench) measureRivals(ctx context.Context) (err error) {
	if err := b.prepareWarm(ctx); err != nil {
		return err
	}
	id, _, err := b.create(ctx, false)
	if err != nil {
		return err
	}
	all := b.asRival(id)
	defer func() { err = errors.Join(err, all.end()) }()
	for _, candidate := range []struct {
		name     string
		packages []string
		prepare  func(context.Context, *rivalReport) (*rival, error)
	}{
		{rivalLibvirt, []string{"libvirt-daemon", "libvirt-clients", "libvirt-daemon-driver-qemu"}, b.prepareLibvirt},
		{rivalPodman, []string{"podman", "crun"}, b.preparePodman},
	} {
		told := rivalReport{Name: candidate.name}
		r, err := b.prepareRival(ctx, &told, candidate.packages, candidate.prepare)
		if err != nil {
			told.LeftOut = err.Error()
			say("  %s is left out: %v", candidate.name, err)
		}
		b.report.Rivals = append(b.report.Rivals, told)
		if r != nil {
			all.join(r)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return b.competeRivals(ctx, all)
}

// asRival is hutch as one of them, with a sandbox that is there.
func (b *bench) asRival(id string) *rival {
	return &rival{
		starts: []side{{name: sideHutch, do: func(ctx context.Context) ([]time.Duration, error) {
			took, _, err := b.createToTrue(ctx, b.host, false)
			return []time.Duration{took}, err
		}}, {name: sideCold, every: 2, do: b.coldSide}},
		execs: []side{{name: sideHutch, do: func(ctx context.Context) ([]time.Duration, error) {
			took, err := clocked(func() error { _, err := b.host.exec(ctx, id, "/bin/true"); return err })
			return []time.Duration{took}, err
		}}},
		sleeps: []side{{name: sideHutch, do: func(ctx context.Context) ([]time.Duration, error) { return b.sleepAndWake(ctx, id) }}},
		end:    func() error { return b.host.destroy(context.Background(), id) },
	}
}

// join adds the sides of another, and its end before r's own.
func (r *rival) join(other *rival) {
	r.starts, r.execs, r.sleeps = append(r.starts, other.starts...), append(r.execs, other.execs...), append(r.sleeps, other.sleeps...)
	end := r.end
	r.end = func() error { return errors.Join(other.end(), end()) }
}

// competeRivals holds the contests in which there is somebody to stand beside.
// One that breaks off is told, and takes nothing of the rest with it.
func (b *bench) competeRivals(ctx context.Context, all *rival) error {
	for _, held := range []struct {
		names  []string
		rounds int
		sides  []side
	}{
		{[]string{rivalStart}, b.plan.Rivals, all.starts},
		{[]string{rivalExec}, b.plan.RivalExecs, all.execs},
		{[]string{rivalSleep, rivalWake}, b.plan.Rivals, all.sleeps},
	} {
		if !slices.ContainsFunc(held.sides, func(s side) bool { return classOf(s.name) == classOther }) {
			continue
		}
		c, err := compete(ctx, held.names, held.rounds, 1, held.sides)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			say("  broke off: %v", err)
			b.report.Rivals = append(b.report.Rivals, rivalReport{Name: held.names[0], LeftOut: err.Error()})
			continue
		}
		b.report.Contests = append(b.report.Contests, c...)
	}
	return nil
}

func (b *bench) prepareRival(ctx context.Context, told *rivalReport, packages []string, prepare func(context.Context, *rivalReport) (*rival, error)) (*rival, error) {
	versions, err := install(ctx, packages)
	if err != nil {
		return nil, fmt.Errorf("its packages can't be had: %w", err)
	}
	told.Versions = versions
	return prepare(ctx, told)
}
