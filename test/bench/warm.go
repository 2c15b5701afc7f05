package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
	"github.com/hutch-run/hutch/internal/host/snapshot"
)

// Names of contests and of sides.
const (
	createToExec = "create to first exec"

	sideFloor = "floor"
	sideHutch = "hutch"
	sideCold  = "hutch, cold"
)

// prepareWarm makes the template warm, and a bare machine that stood still. It
// does so once.
func (b *bench) prepareWarm(ctx context.Context) error {
	if b.saved != nil {
		return nil
	}
	if err := b.makeWarm(ctx, b.host); err != nil {
		return err
	}
	var err error
	if b.saved, err = b.saveBare(ctx); err != nil {
		return err
	}
	// Also to have the files of both in the host's cache.
	m, err := b.restoreBare(ctx)
	if err != nil {
		return err
	}
	b.report.Commands.BareRestored = m.argv
	return m.end()
}

func (b *bench) makeWarm(ctx context.Context, d *daemon) error {
	_, err := d.templates.WarmTemplate(ctx, connect.NewRequest(&hostagentv1.WarmTemplateRequest{
		Name: templateName, MemoryMb: int32(b.plan.MemoryMB), DiskSizeMb: int32(b.plan.DiskSizeMB), //nolint:gosec // constants of this program
	}))
	if err != nil {
		return fmt.Errorf("make the template warm: %w", err)
	}
	return nil
}

// saveBare boots a bare machine, has it run once what its copies are asked to
// run, as hutch does with what it makes warm, and keeps what it was.
func (b *bench) saveBare(ctx context.Context) (_ *bareSaved, err error) {
	dir := filepath.Join(b.scratch, "bare-saved")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	m, err := startBare(ctx, b.bare)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	if _, err := m.ask("exec /bin/true"); err != nil {
		return nil, err
	}
	memory, err := snapshot.NewMemory("bare-memory", 0)
	if err != nil {
		return nil, err
	}
	saved, err := m.save(ctx, dir, memory)
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	// The disk goes with the machine, so it moves out of its directory.
	data := filepath.Join(dir, dataImage)
	if err := errors.Join(snapshot.Seal(memory), os.Rename(saved.data, data)); err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	saved.data = data
	return saved, nil
}

// restoreBare starts a copy of the bare machine that stood still.
func (b *bench) restoreBare(ctx context.Context) (*bare, error) {
	p := b.bare
	p.from = b.saved
	return startBare(ctx, p)
}

// restoreFloor is a copy of a bare machine, to its first exec.
func (b *bench) restoreFloor(ctx context.Context) ([]time.Duration, error) {
	m, err := b.restoreBare(ctx)
	if err != nil {
		return nil, err
	}
	return []time.Duration{m.took}, m.end()
}

// createToTrue makes a sandbox, runs /bin/true in it, and destroys it after the
// clock has stopped.
func (b *bench) createToTrue(ctx context.Context, d *daemon, cold bool) (took time.Duration, s createSample, err error) {
	began := time.Now()
	id, s, err := b.createOn(ctx, d, cold)
	if err != nil {
		return 0, s, err
	}
	_, err = d.exec(ctx, id, "/bin/true")
	took = time.Since(began)
	return took, s, errors.Join(err, d.destroy(ctx, id))
}

// measureWarm measures a warm create to the result of its first exec, against
// its floor and against a cold one.
func (b *bench) measureWarm(ctx context.Context) error {
	if err := b.prepareWarm(ctx); err != nil {
		return err
	}
	held, err := compete(ctx, []string{createToExec}, b.plan.Warm, 2, []side{
		{name: sideFloor, do: b.restoreFloor},
		{name: sideHutch, do: b.warmSide},
		{name: sideCold, every: 2, do: b.coldSide},
	})
	b.report.Contests = append(b.report.Contests, held...)
	return err
}

func (b *bench) warmSide(ctx context.Context) ([]time.Duration, error) {
	took, s, err := b.createToTrue(ctx, b.host, false)
	b.report.WarmStages = append(b.report.WarmStages, warmStages{s.Stages, s.Hutch, micros(took) - s.Hutch})
	return []time.Duration{took}, err
}

func (b *bench) coldSide(ctx context.Context) ([]time.Duration, error) {
	took, _, err := b.createToTrue(ctx, b.host, true)
	return []time.Duration{took}, err
}

// warmStages is where the time of a warm create and its first exec went,
// microseconds.
type warmStages struct {
	Stages map[string]int64 `json:"stages"` // as hutchd tells
	Create int64            `json:"create"` // API call to reply
	Exec   int64            `json:"exec"`   // API call to reply
}
