package quiesce

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// freezeLimit is what programs get to stand still. One that waits for a disk
	// does so only when the disk has answered.
	freezeLimit = 10 * time.Second
	// lonely is how long a still guest stays so without a host, and patience is
	// how long with one. Both count while the guest's clock runs.
	lonely   = 30 * time.Second
	patience = 5 * time.Minute
	// lookEvery is how often a still guest looks for its host.
	lookEvery = 5 * time.Second
)

// Params is what a Quiet is made of. All are needed but the last ones.
type Params struct {
	// Cgroups is the root of the cgroup2 tree, and Spare the name of the group
	// in it that is never frozen: the agent's.
	Cgroups, Spare string
	// Sync writes the data disk back.
	Sync func() error
	// Away reports that no host is connected.
	Away func() bool
	// Note is the file that tells the next server of this boot what is frozen.
	Note string
	Log  *slog.Logger

	// Tests only; 0: the constants of these names.
	freezeLimit, lonely, patience, lookEvery time.Duration
}

// Report is how a Quiesce went.
type Report struct {
	// Flush is how long the data disk was written back while programs ran,
	// Freeze how long it took them to stand still, and Sync how long the rest
	// was written back.
	Flush, Freeze, Sync time.Duration
	// Frozen names the cgroups that are frozen.
	Frozen []string
}

// Quiet is whether the guest is still. All methods are safe for concurrent use.
// Enter and Leave are for those who start programs.
type Quiet struct {
	gate
	p      Params
	turn   chan struct{} // held by whoever changes the state
	frozen freezer       // of the holder of the turn

	watchers sync.WaitGroup
	unwatch  context.CancelFunc // of the holder of the turn; nil: nobody watches
}

// New returns the Quiet of a guest that is not still.
func New(p Params) *Quiet {
	p.freezeLimit = cmp.Or(p.freezeLimit, freezeLimit)
	p.lonely = cmp.Or(p.lonely, lonely)
	p.patience = cmp.Or(p.patience, patience)
	p.lookEvery = cmp.Or(p.lookEvery, lookEvery)
	q := &Quiet{p: p, turn: make(chan struct{}, 1)}
	q.frozen = freezer{
		root: p.Cgroups, spare: p.Spare, limit: p.freezeLimit,
		note: func(names []string) error { return writeNote(p.Note, names) },
	}
	return q
}

// Recover makes the guest still if the server before left it so. Call it
// before anything else.
func (q *Quiet) Recover() error {
	names, still, err := readNote(q.p.Note)
	if err != nil || !still {
		return err
	}
	q.frozen.frozen = names
	q.gate.close()
	q.watch()
	return nil
}

// Still reports whether the guest is still, or about to be.
func (q *Quiet) Still() bool { return q.gate.isShut() }

func (q *Quiet) take(ctx context.Context) error {
	select {
	case q.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (q *Quiet) give() { <-q.turn }

// Quiesce makes the guest still. Repeating it does it all again, and is no
// error. When it fails, the guest is as it was before.
func (q *Quiet) Quiesce(ctx context.Context) (Report, error) {
	if err := q.take(ctx); err != nil {
		return Report{}, fmt.Errorf("quiesce: %w", err)
	}
	defer q.give()
	was := q.Still()
	r, err := q.quiesce(ctx)
	if err != nil && !was {
		err = errors.Join(err, q.end(false))
	}
	if err != nil {
		return Report{}, fmt.Errorf("quiesce: %w", err)
	}
	q.watch()
	return r, nil
}

// quiesce writes the disk back twice: the first time is the long one, and
// programs run meanwhile.
func (q *Quiet) quiesce(ctx context.Context) (Report, error) {
	var r Report
	for _, step := range []struct {
		name string
		run  func(context.Context) error
		took *time.Duration
	}{
		{"write data disk back", q.sync, &r.Flush},
		{"stop programs", q.freeze, &r.Freeze},
		{"write data disk back", q.sync, &r.Sync},
	} {
		began := time.Now()
		if err := step.run(ctx); err != nil {
			return Report{}, fmt.Errorf("%s: %w", step.name, err)
		}
		*step.took = time.Since(began)
	}
	r.Frozen = append(r.Frozen, q.frozen.frozen...)
	return r, nil
}

// sync can't be interrupted, but whoever gave up meanwhile is heard.
func (q *Quiet) sync(ctx context.Context) error {
	if err := q.p.Sync(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

func (q *Quiet) freeze(ctx context.Context) error {
	q.gate.close()
	if err := q.gate.await(ctx); err != nil {
		return err
	}
	return q.frozen.freeze(ctx)
}

// Wake calls configure and then ends the stillness, if there is one. When
// configure fails, the guest stays still, and Wake may be called again. A copy
// turns away the starts that waited: they were meant for the original.
func (q *Quiet) Wake(ctx context.Context, copied bool, configure func(still bool) error) error {
	if err := q.take(ctx); err != nil {
		return fmt.Errorf("configure guest: %w", err)
	}
	defer q.give()
	still := q.Still()
	if err := configure(still); err != nil || !still {
		return err
	}
	q.stopWatch()
	if err := q.end(copied); err != nil {
		q.watch()
		return fmt.Errorf("let programs go on: %w", err)
	}
	return nil
}

// end lets programs go on. When it fails, the guest counts as still.
func (q *Quiet) end(copied bool) error {
	if err := q.frozen.thaw(); err != nil {
		return err
	}
	err := removeNote(q.p.Note)
	q.gate.open(copied)
	return err
}

// Close ends the watch for the host. The guest stays as it is.
func (q *Quiet) Close() {
	q.turn <- struct{}{}
	defer q.give()
	q.stopWatch()
}

// SyncDisk returns a Params.Sync for the filesystem that is mounted at dir.
func SyncDisk(dir string) func() error {
	return func() error {
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", dir, err)
		}
		defer unix.Close(fd)
		for {
			if err := unix.Syncfs(fd); err != unix.EINTR {
				return err
			}
		}
	}
}
