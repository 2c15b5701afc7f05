package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/snapshot"
)

// Names of contests.
const (
	forkContest  = "fork to the copy's first exec"
	stillContest = "fork, source stands still"
)

// measureFork measures copies of a running sandbox: until the result of an exec in
// the copy, and how long the source stands still.
func (b *bench) measureFork(ctx context.Context) (err error) {
	id, _, err := b.create(ctx, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.host.destroy(ctx, id)) }()
	m, err := startBare(ctx, b.bare)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	// What the copies are asked to do has been done before, on both sides.
	if _, err := m.ask("exec /bin/true"); err != nil {
		return err
	}
	if _, err := b.host.exec(ctx, id, "/bin/true"); err != nil {
		return err
	}
	held, err := compete(ctx, []string{forkContest, stillContest}, b.plan.Forks, 1, []side{
		{name: sideFloor, do: func(ctx context.Context) ([]time.Duration, error) { return b.forkBare(ctx, m) }},
		{name: sideHutch, do: func(ctx context.Context) ([]time.Duration, error) { return b.fork(ctx, id) }},
	})
	b.report.Contests = append(b.report.Contests, held...)
	return err
}

func (b *bench) fork(ctx context.Context, id string) ([]time.Duration, error) {
	began := time.Now()
	res, err := b.host.snapshots.ForkSandbox(ctx, connect.NewRequest(&hostagentv1.ForkSandboxRequest{SandboxId: id, Count: 1}))
	if err != nil {
		return nil, err
	}
	still := time.Duration(res.Msg.GetStoppedMicros()) * time.Microsecond
	var ids []string
	for _, f := range res.Msg.GetForks() {
		ids = append(ids, f.GetSandboxId())
	}
	_, err = b.host.exec(ctx, ids[0], "/bin/true")
	took := time.Since(began)
	return []time.Duration{took, still}, errors.Join(err, b.destroyAll(ctx, ids))
}

// forkBare stops a bare machine, copies its devices, its memory and its data
// disk, lets it go on, and starts a copy.
func (b *bench) forkBare(ctx context.Context, m *bare) (_ []time.Duration, err error) {
	dir, err := os.MkdirTemp(b.scratch, "bare-fork-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p := b.bare
	still, err := clocked(func() error {
		memory, err := snapshot.NewMemory("bare-memory", 0)
		if err != nil {
			return err
		}
		if p.from, err = m.save(ctx, dir, memory); err != nil {
			return errors.Join(err, memory.Close())
		}
		data := filepath.Join(dir, dataImage)
		if err := runIn(ctx, dir, "cp", "--sparse=always", p.from.data, data); err != nil {
			return errors.Join(err, memory.Close())
		}
		p.from.data = data
		return m.qmp.do("cont", nil, nil)
	})
	if err != nil {
		return nil, err
	}
	defer p.from.memory.Close()
	forked, err := startBare(ctx, p)
	if err != nil {
		return nil, err
	}
	took := still + forked.took
	// The source's link was closed; that it answers again is not measured.
	return []time.Duration{took, still}, errors.Join(forked.end(), m.first(ctx, "exec /bin/true", "exit 0"))
}
