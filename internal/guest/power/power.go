package power

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

const (
	// DefaultGrace is what users' processes get to end when nobody says.
	DefaultGrace = 25 * time.Second
	// MaxGrace bounds what a caller may ask for.
	MaxGrace = time.Hour
	// ackTime is left between the request and the power-off for the answer to
	// reach the host: nothing tells when it has.
	ackTime = 250 * time.Millisecond
	// killTime is what the Stopper gets to kill what outlived the grace.
	killTime = 5 * time.Second
	// syncTime bounds each wait for the disks. One that no longer answers must
	// not keep the machine on.
	syncTime = 15 * time.Second
	// restTime bounds each wait for filesystems to become read-only.
	restTime = 2 * time.Second
	// shareTime bounds the wait for each share to be unmounted.
	shareTime = 2 * time.Second
)

// Stopper ends the processes of users.
type Stopper interface {
	// Shutdown asks all processes to end, kills those that are left after grace,
	// and returns when none is left, or with an error when ctx is done before.
	// It may be called again; a grace of 0 kills at once.
	Shutdown(ctx context.Context, grace time.Duration) error
}

// Params are what a Power is made of. All are needed.
type Params struct {
	Stopper Stopper
	Kernel  Kernel
	Log     *slog.Logger
}

// Power ends the machine when asked to, and trims its disks. Safe for
// concurrent use.
type Power struct {
	stopper  Stopper
	kernel   Kernel
	log      *slog.Logger
	trimming chan struct{}
	changed  chan struct{} // told when the deadline was set or moved; never blocks

	mu       sync.Mutex
	asked    time.Time // of the first request; zero: none
	deadline time.Time // when the grace ends
}

// New returns a Power that waits for requests. Run must be running for them
// to have an effect.
func New(p Params) *Power {
	return &Power{
		stopper: p.Stopper, kernel: p.Kernel, log: p.Log,
		trimming: make(chan struct{}, 1), changed: make(chan struct{}, 1),
	}
}

// Shutdown asks for the end of the machine and returns at once. Processes get
// grace to end, DefaultGrace when it is not positive. The first request
// decides; later ones change nothing, except that a grace that ends earlier
// than the one running shortens it.
func (p *Power) Shutdown(grace time.Duration) {
	if grace <= 0 {
		grace = DefaultGrace
	}
	now := time.Now()
	deadline := now.Add(min(grace, MaxGrace))
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked.IsZero() {
		p.asked = now
	} else if !deadline.Before(p.deadline) {
		return
	}
	p.deadline = deadline
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// Run waits for a request and ends the machine. It returns when ctx ends
// before a request came (the error is nil then), or when the machine could not
// be ended. After a request, ctx no longer matters.
func (p *Power) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-p.changed:
	}
	if err := p.kernel.Own(); err != nil {
		return fmt.Errorf("shut down: %w", err)
	}
	ctx = context.WithoutCancel(ctx)
	p.mu.Lock()
	asked, grace := p.asked, time.Until(p.deadline)
	p.mu.Unlock()
	p.log.Info("shutting down", "grace", grace)
	if err := p.stop(ctx, grace); err != nil {
		p.log.Warn("not all processes ended", "err", err)
	}
	p.leaveShares(ctx)
	p.sync(ctx)
	p.rest(ctx)
	ack := time.NewTimer(ackTime - time.Since(asked))
	defer ack.Stop()
	<-ack.C
	p.log.Info("powering off")
	if err := p.kernel.Off(); err != nil {
		return fmt.Errorf("power off: %w", err)
	}
	return nil
}

// stop ends all processes: the Stopper first, in its order, until the grace
// that counts is over; then, at once, whatever is left.
func (p *Power) stop(ctx context.Context, grace time.Duration) error {
	err := p.ask(ctx, max(grace, 0))
	if err != nil {
		ctx, cancel := context.WithTimeout(ctx, killTime)
		defer cancel()
		err = p.stopper.Shutdown(ctx, 0)
	}
	// Nothing but this program and PID 1 may hold a file from here on.
	return errors.Join(err, p.kernel.KillAll())
}

// ask runs the Stopper with grace. It gives up when that takes longer, or when
// a later request cut the grace short.
func (p *Power) ask(ctx context.Context, grace time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- p.stopper.Shutdown(ctx, grace) }()
	timer := time.NewTimer(grace + killTime)
	defer timer.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-p.changed:
			if ctx.Err() == nil {
				p.mu.Lock()
				timer.Reset(time.Until(p.deadline))
				p.mu.Unlock()
			}
		case <-timer.C:
			if ctx.Err() != nil {
				return errors.New("the processes can't be stopped")
			}
			cancel()
			timer.Reset(killTime)
		}
	}
}

// leaveShares unmounts what the host serves, newest first. It comes before the
// disks, and apart from them: one that is not served any more never answers.
func (p *Power) leaveShares(ctx context.Context) {
	mounts, err := p.kernel.Mounts()
	if err != nil {
		return // told by what comes next
	}
	for _, m := range slices.Backward(mounts) {
		if !m.served() {
			continue
		}
		p.bounded(ctx, "unmount "+m.Point, shareTime, func() {
			if err := p.kernel.Unmount(m.Point); err != nil {
				p.log.Warn("share is still in use", "err", err)
			}
		})
	}
}

// sync writes the disks back, within bounds. The goroutine of a sync that
// hangs ends with the machine.
func (p *Power) sync(ctx context.Context) {
	p.bounded(ctx, "sync", syncTime, p.kernel.Sync)
}

// bounded runs f and gives up waiting for it after limit.
func (p *Power) bounded(ctx context.Context, what string, limit time.Duration, f func()) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		p.log.Warn("a disk does not answer, going on without it", "waiting_for", what, "waited", limit)
	}
}

// rest brings all filesystems to rest, so that none needs a repair at its next
// mount. It goes from the newest mount to the oldest, since those stand on
// one another.
func (p *Power) rest(ctx context.Context) {
	p.bounded(ctx, "unmount", syncTime, func() {
		left := p.awaitRest(p.restOnce)
		if len(left) == 0 {
			return
		}
		p.log.Warn("filesystems are still in use, forcing them read-only", "mounts", points(left))
		if err := p.kernel.EmergencyReadOnly(); err != nil {
			p.log.Warn("filesystems stay writable", "err", err)
			return
		}
		p.awaitRest(p.writable)
		p.kernel.Sync()
	})
}

// awaitRest calls look until it finds nothing writable, for restTime at the
// longest, and returns what it found last. What is killed or unmounted in one
// round may be what kept others busy.
func (p *Power) awaitRest(look func() []Mount) []Mount {
	deadline := time.Now().Add(restTime)
	tick := time.NewTicker(20 * time.Millisecond) // the kernel tells nobody when it is done
	defer tick.Stop()
	for {
		left := look()
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		<-tick.C
	}
}

// restOnce remounts read-only and unmounts what it can, and returns what
// stayed writable.
func (p *Power) restOnce() []Mount {
	mounts, err := p.kernel.Mounts()
	if err != nil {
		p.log.Warn("can't list mounts", "err", err)
		return nil
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		m := mounts[i]
		if !m.writable() {
			continue
		}
		// Read-only first: that marks the filesystem clean even where an
		// overlay or another mount keeps it from going away.
		err := p.kernel.RemountReadOnly(m.Point)
		if m.Point == "/" {
			continue
		}
		if unmountErr := p.kernel.Unmount(m.Point); err != nil && unmountErr != nil {
			p.log.Debug("filesystem in use", "remount", err, "unmount", unmountErr)
		}
	}
	return p.writable()
}

// writable lists what a shutdown has not yet brought to rest.
func (p *Power) writable() []Mount {
	mounts, err := p.kernel.Mounts()
	if err != nil {
		return nil
	}
	var left []Mount
	for _, m := range mounts {
		if m.writable() {
			left = append(left, m)
		}
	}
	return left
}

func points(mounts []Mount) []string {
	names := make([]string, 0, len(mounts))
	for _, m := range mounts {
		names = append(names, m.Point)
	}
	return names
}
