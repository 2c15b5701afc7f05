package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hutch-run/hutch/internal/delay"
)

// spareContest is a create that takes a sandbox that was started ahead.
const spareContest = "create to first exec, of a spare"

// spareStage is the stage of a create that took one.
const spareStage = "spare"

// spareTime bounds the making of a spare.
const spareTime = time.Minute

// measureSpare measures a create that finds a spare, by a hutchd that makes them.
// The making is not in its time, and is over before somebody else has a turn.
func (b *bench) measureSpare(ctx context.Context) (err error) {
	if err := b.prepareWarm(ctx); err != nil {
		return err
	}
	d, err := startDaemon(ctx, filepath.Join(b.scratch, "spare"), b.prepared, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	if err := b.makeWarm(ctx, d); err != nil {
		return err
	}
	// The first create is a copy, behind which a spare is made.
	if _, _, err := b.createToTrue(ctx, d, false); err != nil {
		return err
	}
	if err := awaitSpare(ctx, d); err != nil {
		return err
	}
	held, err := compete(ctx, []string{spareContest}, b.plan.Spares, 2, []side{
		{name: sideFloor, do: b.restoreFloor},
		{name: sideHutch, do: func(ctx context.Context) ([]time.Duration, error) {
			took, s, err := b.createToTrue(ctx, d, false)
			if _, ok := s.Stages[spareStage]; err == nil && !ok {
				err = fmt.Errorf("no spare was taken: %v", s.Stages)
			}
			return []time.Duration{took}, errors.Join(err, awaitSpare(ctx, d))
		}},
		{name: sideCold, every: 4, do: b.coldSide},
	})
	b.report.Contests = append(b.report.Contests, held...)
	return err
}

// awaitSpare waits until there is a spare, which no call tells of: hutchd lists
// what callers made. Its record does.
func awaitSpare(ctx context.Context, d *daemon) error {
	ctx, cancel := context.WithTimeout(ctx, spareTime)
	defer cancel()
	for {
		ready, err := hasSpare(d)
		if err != nil {
			return err
		}
		// The record is written a moment before hutchd counts on it.
		if err := delay.For(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("wait for a spare: %w", err)
		}
		if ready {
			return nil
		}
	}
}

func hasSpare(d *daemon) (bool, error) {
	records, err := filepath.Glob(filepath.Join(d.root, "sandboxes/*/record.json"))
	if err != nil {
		return false, err
	}
	for _, path := range records {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // it is just being destroyed
		}
		if err != nil {
			return false, err
		}
		var record struct{ State string }
		if err := json.Unmarshal(text, &record); err != nil {
			return false, fmt.Errorf("read %s: %w", path, err)
		}
		if record.State == "paused" {
			return true, nil
		}
	}
	return false, nil
}
