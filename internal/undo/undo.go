// Package undo keeps what must be taken back when a piece of work fails
// half-way.
//
// It owns the order (last in, first out), the rule that every undo is tried
// even when one fails, and the context that cleanup runs on, which is never a
// dead one. It never decides whether to undo: the caller releases the stack
// when the work is done. Tested by its own unit tests.
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// CleanupTimeout bounds one cleanup that was cut loose from its caller.
const CleanupTimeout = 30 * time.Second

// Detach returns a context for cleanup: it carries ctx's values, ignores its
// cancellation, and ends after CleanupTimeout.
func Detach(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), CleanupTimeout)
}

// Func takes one acquired thing back. It must be idempotent.
type Func func(context.Context) error

type entry struct {
	name string
	fn   Func
}

// Stack is a stack of undos. The zero value is empty and ready; a Stack is
// used by one goroutine at a time.
type Stack struct {
	entries []entry
}

// Add pushes an undo. Call it right after the acquire it belongs to succeeded.
func (s *Stack) Add(name string, fn Func) {
	s.entries = append(s.entries, entry{name, fn})
}

// Release forgets all undos: the work is done and stays.
func (s *Stack) Release() { s.entries = nil }

// Len returns the number of undos held.
func (s *Stack) Len() int { return len(s.entries) }

// Run takes everything back, last acquired first, on a context of its own. It
// tries every undo and returns their errors joined. Undos that failed stay on
// the stack, so that a second Run tries just those again.
func (s *Stack) Run(ctx context.Context) error { return s.RunTo(ctx, 0) }

// RunTo is Run for all but the first n undos: those that were there when Len
// was n.
func (s *Stack) RunTo(ctx context.Context, n int) error {
	ctx, cancel := Detach(ctx)
	defer cancel()
	var failed []entry
	var errs []error
	for i := len(s.entries) - 1; i >= n; i-- {
		e := s.entries[i]
		if err := e.fn(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", e.name, err))
			failed = append([]entry{e}, failed...)
		}
	}
	s.entries = append(s.entries[:min(n, len(s.entries))], failed...)
	return errors.Join(errs...)
}
