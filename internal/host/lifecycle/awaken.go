package lifecycle

import (
	"context"

	"github.com/hutch-run/hutch/internal/sandbox"
)

// want notes a use on its way: until release the sandbox is not taken for
// inactive, and a hibernation that its timeout began ends. A use that the state
// forbids changes nothing.
func (b *box) want() (release func()) {
	if !usable(b.pub.Load().rec) {
		return func() {}
	}
	b.mu.Lock()
	b.wanted++
	if b.light {
		b.rouse()
	}
	b.mu.Unlock()
	return func() {
		b.mu.Lock()
		b.wanted--
		b.mu.Unlock()
		b.wake()
	}
}

// usable reports whether a use is served, be it after a wait or a resume.
func usable(rec sandbox.Record) bool {
	v, _ := sandbox.Decide(rec.State, sandbox.Use)
	return v != sandbox.Deny || lightAsleep(rec)
}

// lightAsleep reports whether a sandbox sleeps and a use may resume it.
func lightAsleep(rec sandbox.Record) bool {
	return rec.Spec.AutoResume && (rec.State == sandbox.Paused || rec.State == sandbox.Hibernated)
}

// awaken has a sandbox that a use may resume do so if it sleeps. Its error is
// that of the resume, for all who wait for the same one.
func (b *box) awaken(ctx context.Context) error {
	r := b.askWake()
	if r == nil {
		return nil
	}
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// askWake returns the resume that uses wait for, after asking for it if need
// be. It returns nil when there is none, or the driver has ended.
func (b *box) askWake() *request {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return nil
	}
	if b.waking == nil && lightAsleep(b.pub.Load().rec) {
		b.waking = &request{kind: sandbox.Resume, do: func() error { return b.resume("resumed by use") }, done: make(chan struct{})}
		b.wake()
	}
	return b.waking
}

func (b *box) wakeAsked() *request {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.waking
}

// answerWake is the driver's turn to resume the sandbox for those who use it.
// Who has seen its end asks anew.
func (b *box) answerWake(r *request) {
	r.err = b.decide(r)
	b.mu.Lock()
	b.waking = nil
	b.mu.Unlock()
	close(r.done)
}
