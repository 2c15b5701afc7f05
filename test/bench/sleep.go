package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

// Names of contests.
const (
	sleepContest = "hibernate"
	wakeContest  = "resume to first exec"
)

// measureSleep measures hibernation, and the way back to the result of an exec.
func (b *bench) measureSleep(ctx context.Context) (err error) {
	id, _, err := b.create(ctx, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.host.destroy(ctx, id)) }()
	both, err := compete(ctx, []string{sleepContest, wakeContest}, b.plan.Sleeps, 1, []side{
		{name: sideFloor, do: b.bareSleepAndWake},
		{name: sideHutch, do: func(ctx context.Context) ([]time.Duration, error) { return b.sleepAndWake(ctx, id) }},
	})
	b.report.Contests = append(b.report.Contests, both...)
	return err
}

// sleepAndWake hibernates a sandbox and brings it back.
func (b *bench) sleepAndWake(ctx context.Context, id string) ([]time.Duration, error) {
	slept, err := clocked(func() error {
		_, err := b.host.sandboxes.HibernateSandbox(ctx, connect.NewRequest(&hostagentv1.HibernateSandboxRequest{SandboxId: id}))
		return err
	})
	if err != nil {
		return nil, err
	}
	woke, err := clocked(func() error {
		if _, err := b.host.host.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{SandboxId: id})); err != nil {
			return err
		}
		_, err := b.host.exec(ctx, id, "/bin/true")
		return err
	})
	return []time.Duration{slept, woke}, err
}

// bareSleepAndWake boots a bare machine, writes it into files on disk, synced,
// and ends it; and starts one from these files, whose memory is the file, copied
// on write.
func (b *bench) bareSleepAndWake(ctx context.Context) (_ []time.Duration, err error) {
	m, err := startBare(ctx, b.bare)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	if _, err := m.ask("exec /bin/true"); err != nil {
		return nil, err
	}
	p := b.bare
	slept, err := clocked(func() error {
		var err error
		if p.from, err = m.toDisk(ctx); err != nil {
			return err
		}
		return m.kill()
	})
	if p.from != nil {
		defer p.from.memory.Close()
	}
	if err != nil {
		return nil, err
	}
	woken, err := startBare(ctx, p)
	if err != nil {
		return nil, err
	}
	return []time.Duration{slept, woken.took}, woken.end()
}

// toDisk saves the machine into its own directory, to stay.
func (b *bare) toDisk(ctx context.Context) (*bareSaved, error) {
	memory, err := os.Create(filepath.Join(b.dir, "memory"))
	if err != nil {
		return nil, err
	}
	saved, err := b.save(ctx, b.dir, memory)
	if err == nil {
		err = errors.Join(memory.Sync(), syncPath(saved.state), syncPath(b.dir))
	}
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	return saved, nil
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
