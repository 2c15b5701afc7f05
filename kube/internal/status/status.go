// Package status tells how the parts of the cluster are.
//
// A Board holds one Check per part and asks them all when it is asked, side by side and within a bound: an idle cluster costs nothing. What it
// found is good for a second, and only one round runs at a time. It serves that over HTTP on loopback: /status (JSON), /healthz (all parts) and /healthz/NAME.
// It changes nothing and shows no secret. Tests need no cluster.
package status

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	// bound is for one round: beyond it a part isn't ready.
	bound = 5 * time.Second
	// fresh is how long an answer is good.
	fresh = time.Second
	// maxError is the length at which an error is cut, in bytes.
	maxError = 512
)

// Check tells whether a part is ready: nil if it is. It must end when ctx does.
type Check func(ctx context.Context) error

// Component is what is known of a part.
type Component struct {
	Name  string    `json:"name"`
	Ready bool      `json:"ready"`
	Since time.Time `json:"since"`
	Error string    `json:"error,omitempty"`
}

// Report is the state of everything.
type Report struct {
	Version    string      `json:"version"`
	PID        int         `json:"pid"`
	Started    time.Time   `json:"started"`
	APIReady   bool        `json:"api_ready"`
	NodeReady  bool        `json:"node_ready"`
	Ready      bool        `json:"ready"`
	Components []Component `json:"components"`
}

// Board is the list of parts.
type Board struct {
	head Report
	now  func() time.Time

	mu     sync.Mutex // held over a round
	whole  bool       // every part is on the board
	checks []Check
	last   time.Time
	report Report
}

// New makes a board without parts. Version, PID and Started of head are told in every report.
func New(head Report, now func() time.Time) *Board { return &Board{head: head, now: now} }

// Add puts a part on the board.
func (b *Board) Add(name string, check Check) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.checks = append(b.checks, check)
	b.report.Components = append(b.report.Components, Component{Name: name, Since: b.now(), Error: "not asked yet"})
	b.last = time.Time{}
}

// Whole says that every part is on the board: before, it isn't ready as a whole.
func (b *Board) Whole() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.whole, b.last = true, time.Time{}
}

// Report asks every part, or tells what was just found.
func (b *Board) Report(ctx context.Context) Report {
	b.mu.Lock()
	defer b.mu.Unlock()
	if age := b.now().Sub(b.last); age < 0 || age > fresh {
		b.round(ctx)
	}
	r := b.report
	r.Components = append([]Component(nil), r.Components...)
	return r
}

func (b *Board) round(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	errs := make([]error, len(b.checks))
	var wg sync.WaitGroup
	for i, check := range b.checks {
		wg.Go(func() { errs[i] = ask(ctx, check) })
	}
	wg.Wait()
	list := make([]Component, len(errs))
	for i, err := range errs {
		list[i] = b.next(b.report.Components[i], err)
	}
	b.report, b.last = b.head, b.now()
	b.report.Components = list
	b.report.Ready = b.whole
	for _, c := range list {
		b.report.Ready = b.report.Ready && c.Ready
		b.report.APIReady = b.report.APIReady || c.Name == "apiserver" && c.Ready
		b.report.NodeReady = b.report.NodeReady || c.Name == "kubelet" && c.Ready
	}
}

// ask turns a panic of a part that isn't there yet into its error.
func ask(ctx context.Context, check Check) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("check: %v", p)
		}
	}()
	if err := check(ctx); err != nil {
		return err
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer in %v", bound)
	}
	return nil
}

func (b *Board) next(c Component, err error) Component {
	if ready := err == nil; ready != c.Ready {
		c.Ready, c.Since = ready, b.now()
	}
	c.Error = ""
	if err != nil {
		c.Error = err.Error()
		if len(c.Error) > maxError {
			c.Error = c.Error[:maxError]
		}
	}
	return c
}
