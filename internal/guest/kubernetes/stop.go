package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// kind is what a turn does, in a sentence.
type kind string

const (
	stopped kind = "stopped"
	deleted kind = "deleted"
)

// turn is one stop or delete. It goes on when those who asked for it are gone.
type turn struct {
	kind kind
	done chan struct{} // closed when all below err is final
	end  Ended
	err  error

	mu   sync.Mutex
	what string
}

func (t *turn) say(what string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.what = what
}

func (t *turn) step() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.what
}

// Ended is how a stop or a delete went.
type Ended struct {
	// Stopped: nothing of the cluster runs or is in the way any more.
	Stopped bool
	Detail  string
}

// Stop ends the cluster and what it left in the machine, and returns when that
// is over. Its data stays. To stop what does not run is fine. When ctx ends
// first, the stop goes on.
func (c *Cluster) Stop(ctx context.Context) (Ended, error) { return c.take(ctx, stopped, c.stop) }

// Delete stops the cluster and wipes its data, so that a start makes a new one.
// The images of containers stay.
func (c *Cluster) Delete(ctx context.Context) (Ended, error) { return c.take(ctx, deleted, c.wipe) }

// take joins a turn of that kind, or takes one as soon as another is over.
func (c *Cluster) take(ctx context.Context, k kind, run func(context.Context, *turn, Distribution) (Ended, error)) (Ended, error) {
	d, err := c.distribution()
	if err != nil {
		return Ended{}, err
	}
	for {
		t := c.begin(k, func(t *turn) (Ended, error) { return run(c.ctx, t, d) })
		select {
		case <-t.done:
		case <-ctx.Done():
			return Ended{}, fmt.Errorf("wait until Kubernetes is %s: %w", t.kind, context.Cause(ctx))
		}
		if t.kind == k {
			return t.end, t.err
		}
	}
}

// begin returns the turn that goes on, or starts one.
func (c *Cluster) begin(k kind, run func(*turn) (Ended, error)) *turn {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.turn != nil {
		return c.turn
	}
	t := &turn{kind: k, done: make(chan struct{})}
	c.turn = t
	c.all.Go(func() {
		t.end, t.err = run(t)
		c.mu.Lock()
		c.turn = nil
		c.mu.Unlock()
		close(t.done)
	})
	return t
}

// rounds is how often what was left is removed: one thing may have held another.
const rounds = 3

// stop is the work of a turn.
func (c *Cluster) stop(ctx context.Context, t *turn, d Distribution) (Ended, error) {
	before, _ := c.p.Units.Status(UnitName)
	if before.State != supervise.Stopped {
		t.say("waiting for the end of " + d.Name)
		if err := c.p.Units.Stop(ctx, UnitName, 0); err != nil {
			return Ended{}, fmt.Errorf("stop %s: %w", d.Name, err)
		}
	}
	c.mu.Lock()
	c.forget()
	c.mu.Unlock()
	if !marked(c.p.Mark) {
		return Ended{Stopped: true, Detail: d.Name + " is not running"}, nil
	}
	after, _ := c.p.Units.Status(UnitName)
	clean := before.PID != 0 && after.Last != nil && after.Last.Known && after.Last.Signal == 0 && after.Last.Code == 0
	how := []string{d.Name + " is stopped"}
	if before.PID != 0 && !clean && after.Last != nil {
		how = append(how, "it ended badly ("+after.Last.String()+")")
	}
	left, err := c.cleanUp(ctx, t, d, clean)
	if err != nil {
		how = append(how, err.Error())
	}
	if len(left) > 0 {
		how = append(how, "left: "+list(left))
		return Ended{Detail: strings.Join(how, "; ")}, nil
	}
	if err := c.p.Machine.Restore(); err != nil {
		how = append(how, err.Error())
	}
	return Ended{Stopped: true, Detail: strings.Join(how, "; ")}, os.RemoveAll(c.p.Mark)
}

// cleanUp removes what outlived the program, and returns what can't be. A
// program that ended well has done its own clean-up, so that is run again only
// if something stays.
func (c *Cluster) cleanUp(ctx context.Context, t *turn, d Distribution, clean bool) ([]Leftover, error) {
	left, err := c.p.Machine.Leftovers(d.Leftovers)
	if err != nil || len(left) == 0 {
		return left, err
	}
	var problem error
	if !clean {
		problem = c.reset(ctx, t, d)
	}
	for round := range rounds {
		t.say("removing what it left")
		if left, err = c.p.Machine.Leftovers(d.Leftovers); err != nil || len(left) == 0 {
			return left, err
		}
		if err := remove(ctx, left); err != nil {
			problem = err
		}
		if left, err = c.p.Machine.Leftovers(d.Leftovers); err != nil || len(left) == 0 {
			return left, err
		}
		if clean && round == 0 {
			problem = c.reset(ctx, t, d)
		}
	}
	return left, problem
}

func (c *Cluster) reset(ctx context.Context, t *turn, d Distribution) error {
	if len(d.Reset.Command) == 0 {
		return nil
	}
	t.say("running " + filepath.Base(d.Reset.Command[0]))
	return c.p.Machine.Reset(ctx, d.Reset, d.Env)
}

// maxListed bounds the list of what was left.
const maxListed = 10

func list(left []Leftover) string {
	var names []string
	for _, l := range left[:min(len(left), maxListed)] {
		names = append(names, l.What)
	}
	if n := len(left) - len(names); n > 0 {
		names = append(names, fmt.Sprintf("%d more", n))
	}
	return strings.Join(names, ", ")
}

// wipe is the work of a turn that deletes.
func (c *Cluster) wipe(ctx context.Context, t *turn, d Distribution) (Ended, error) {
	end, err := c.stop(ctx, t, d)
	if err != nil {
		return end, err
	}
	t.say("wiping its data")
	var stays []string
	for _, dir := range d.Data {
		stays = append(stays, empty(dir)...)
	}
	for _, file := range d.Files {
		if err := os.RemoveAll(file); err != nil {
			stays = append(stays, err.Error())
		}
	}
	end.Detail += "; its data is wiped"
	if len(stays) > 0 {
		n := len(stays)
		end.Detail += ", but for: " + strings.Join(stays[:min(n, maxListed)], ", ")
		if n > maxListed {
			end.Detail += fmt.Sprintf(" and %d more", n-maxListed)
		}
	}
	return end, nil
}

// empty removes what is in dir, and returns what can't be removed and why. The
// directory itself may be a mount point.
func empty(dir string) (stays []string) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			stays = append(stays, err.Error())
		}
	}
	return stays
}

func writeMark(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o600)
}

func marked(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
