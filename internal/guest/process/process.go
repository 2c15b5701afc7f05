package process

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// Process is one program and the tree that it makes. All methods are safe for
// concurrent use.
type Process struct {
	table  *Table
	info   Info
	limit  time.Duration
	child  child
	group  *group // nil: no cgroups here
	wires  *wires
	hub    *hub
	pumps  []*pump
	killed bool          // the time limit did; used by the run goroutine only
	exited chan struct{} // closed when the program is reaped

	ended time.Time // when End was told; under the table's lock

	mu     sync.Mutex
	in     *input // nil: no input
	reaped bool
}

// Info returns what is known of the program.
func (p *Process) Info() Info {
	p.mu.Lock()
	defer p.mu.Unlock()
	info := p.info
	info.Ended = p.reaped
	return info
}

// Subscribe follows the output from the oldest retained byte on.
func (p *Process) Subscribe() *Subscription { return p.hub.subscribe() }

// Write gives the program input. Terminal says which kind of input the caller
// means; the wrong one is Invalid.
func (p *Process) Write(ctx context.Context, data []byte, terminal bool) error {
	if terminal != (p.wires.control != nil) {
		if terminal {
			return fault.BadField("input.pty", "the program has no terminal: send stdin")
		}
		return fault.BadField("input.stdin", "the program has a terminal: send pty")
	}
	if p.in == nil {
		return fault.New(fault.Precondition, "the program was started without standard input")
	}
	return p.in.write(ctx, data)
}

// CloseInput ends the program's standard input. It may be repeated.
func (p *Process) CloseInput() error {
	if p.wires.control != nil {
		return fault.New(fault.Precondition, "a terminal's input can't be closed: send Ctrl-D (byte 4) instead")
	}
	if p.in != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.in.close()
	}
	return nil
}

// Resize changes the terminal's size and tells the program (SIGWINCH).
func (p *Process) Resize(size Size) error {
	switch {
	case p.wires.control == nil:
		return fault.New(fault.Precondition, "the program has no terminal to resize")
	case size.Cols == 0 || size.Rows == 0:
		return fault.BadField("pty.size", "cols and rows must be at least 1")
	}
	err := control(p.wires.control, func(fd int) error { return setSize(fd, size) })
	if err != nil {
		return fault.New(fault.Precondition, "resize terminal of process %d: %w", p.info.Pid, err)
	}
	return nil
}

// Signal sends sig to the program, or with tree to everything that came from
// it. SIGKILL always means everything, even when the program itself has ended
// and left processes behind. When nothing is left it is a NotFound error.
func (p *Process) Signal(sig unix.Signal, tree bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	tree = tree || sig == unix.SIGKILL
	if p.reaped && (!tree || p.group == nil || p.group.isGone()) {
		return p.hasEnded()
	}
	switch {
	case sig == unix.SIGKILL:
		return p.kill()
	case tree:
		return p.signalTree(sig)
	}
	if err := p.child.signal(sig); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return p.hasEnded()
		}
		return fmt.Errorf("signal process %d: %w", p.info.Pid, err)
	}
	return nil
}

// hasEnded is NotFound, as for a pid that never was: callers that kill what
// ends at the same moment treat both alike.
func (p *Process) hasEnded() error {
	return fault.New(fault.NotFound, "process %d has ended", p.info.Pid)
}

// kill ends the whole tree. Called with the lock held.
func (p *Process) kill() error {
	if p.group != nil {
		if err := p.group.kill(); err != nil {
			return fmt.Errorf("kill the tree of process %d: %w", p.info.Pid, err)
		}
		return nil
	}
	return p.signalTree(unix.SIGKILL)
}

// signalTree reaches the process group where there is no cgroup, which only
// works while its first process holds the number: it is not reaped. Called
// with the lock held.
func (p *Process) signalTree(sig unix.Signal) error {
	if p.group != nil {
		return p.group.signal(sig)
	}
	if err := unix.Kill(-p.info.Pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal the group of process %d: %w", p.info.Pid, err)
	}
	return nil
}

// run follows the program to its end and beyond, to the end of its streams.
func (p *Process) run() {
	var pumps sync.WaitGroup // and the release of the group
	for _, pu := range p.pumps {
		pumps.Go(pu.run)
	}
	exit := p.waitExit()
	if p.group != nil {
		// Removing a cgroup takes longer than telling the End.
		pumps.Go(p.leaveGroup)
	}
	for _, pu := range p.pumps {
		pu.settle()
	}
	for _, pu := range p.pumps {
		<-pu.drained
	}
	p.hub.end(exit)
	p.table.retire(p)
	pumps.Wait()
	p.wires.closeOurs()
	p.table.forget(p)
}

// leaveGroup gives the group up, and settles what the program left in it.
func (p *Process) leaveGroup() {
	p.group.release()
	if p.table.resetOOM && !p.group.isGone() {
		p.group.equalizeStrays()
	}
}

// awaitEnd is child.await, and looks for strays on the way.
func (p *Process) awaitEnd(deadline time.Time) (bool, error) {
	strays := p.info.Started.Add(strayDelay)
	if p.group == nil || !p.table.resetOOM || (!deadline.IsZero() && deadline.Before(strays)) {
		return p.child.await(deadline)
	}
	if gone, err := p.child.await(strays); gone || err != nil {
		return gone, err
	}
	p.group.equalizeStrays()
	return p.child.await(deadline)
}

// waitExit returns when the program has ended, at the latest when its time is
// over and its tree is dead.
func (p *Process) waitExit() Exit {
	var deadline time.Time
	if p.limit > 0 {
		deadline = p.info.Started.Add(p.limit)
	}
	gone, err := p.awaitEnd(deadline)
	if err == nil && !gone {
		p.killed = true
		p.mu.Lock()
		err = p.kill()
		p.mu.Unlock()
		if err != nil {
			p.table.log.Error("tree of a timed out program not killed", "pid", p.info.Pid, "err", err)
			_ = p.child.signal(unix.SIGKILL)
		}
		_, err = p.child.await(time.Time{})
	}
	if err != nil {
		// wait4 below waits as well, if at the price of a thread.
		p.table.log.Warn("pidfd can't be waited for", "pid", p.info.Pid, "err", err)
	}
	p.mu.Lock()
	if p.in != nil {
		p.in.close()
	}
	ws, err := p.child.reap()
	p.reaped = true
	p.mu.Unlock()
	if err != nil {
		p.table.log.Error("exit status lost", "pid", p.info.Pid, "err", err)
	}
	_ = p.child.pidfd.Close()
	defer close(p.exited)
	exit := exitOf(ws)
	exit.TimedOut = p.killed && exit.Signal == unix.SIGKILL
	exit.Limit = p.limit
	if p.group != nil {
		exit.OOMKilled = p.group.oomKilled()
	}
	return exit
}
