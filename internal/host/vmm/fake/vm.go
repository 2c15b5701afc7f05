package fake

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// vm is one process's hold on a machine.
type vm struct {
	m *Machine

	mu      sync.Mutex
	closed  bool          // guarded by mu
	closing chan struct{} // closed by Close
	done    chan struct{} // closed when the machine ended while held
	watched chan struct{} // closed when the watcher has ended
}

var (
	_ vmm.VM    = (*vm)(nil)
	_ vmm.Saver = (*vm)(nil)
)

func newVM(m *Machine) *vm {
	v := &vm{m: m, closing: make(chan struct{}), done: make(chan struct{}), watched: make(chan struct{})}
	go func() {
		defer close(v.watched)
		select {
		case <-m.done:
			close(v.done)
		case <-v.closing:
		}
	}()
	return v
}

// held says whether the VM was let go of while the machine lived.
func (v *vm) held() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.closed {
		return nil
	}
	select {
	case <-v.done:
		return nil
	default:
		return fault.New(fault.Unavailable, "the machine is let go of: %w", os.ErrClosed)
	}
}

func (v *vm) do(ctx context.Context, what string, f func(*Machine)) error {
	err := v.held()
	if err == nil {
		err = v.m.ready(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, v.m.Spec.ID, err)
	}
	v.m.mu.Lock()
	defer v.m.mu.Unlock()
	f(v.m)
	return nil
}

// Machine is what Adopt needs.
func (v *vm) Machine() sandbox.Machine {
	return sandbox.Machine{Driver: DriverName, Accel: accel, Process: v.m.process, UID: v.m.Spec.UID}
}

// Pause stops the machine.
func (v *vm) Pause(ctx context.Context) error {
	return v.do(ctx, "pause", func(m *Machine) { m.running = false })
}

// Resume starts the machine, after a Save that is going on.
func (v *vm) Resume(ctx context.Context) error {
	if err := v.m.hold(ctx); err != nil {
		return fmt.Errorf("resume %s: %w", v.m.Spec.ID, err)
	}
	defer v.m.release()
	return v.do(ctx, "resume", func(m *Machine) {
		m.running = true
		m.refillLocked()
	})
}

// Running tells which of both was last.
func (v *vm) Running(ctx context.Context) (running bool, err error) {
	err = v.do(ctx, "look at", func(m *Machine) { running = m.running })
	return running, err
}

// DiskFull is closed by Machine.Fill.
func (v *vm) DiskFull() <-chan struct{} {
	v.m.mu.Lock()
	defer v.m.mu.Unlock()
	return v.m.full
}

// Kill ends the machine.
func (v *vm) Kill(ctx context.Context) error {
	if err := v.held(); err != nil {
		return fmt.Errorf("kill %s: %w", v.m.Spec.ID, err)
	}
	v.m.End(vmm.Exit{Reason: vmm.Killed, Detail: "fake ended by signal SIGKILL"})
	select {
	case <-v.watched:
		return v.held()
	case <-ctx.Done():
		return fmt.Errorf("kill %s: %w", v.m.Spec.ID, ctx.Err())
	}
}

// Done is closed when the machine is gone.
func (v *vm) Done() <-chan struct{} { return v.done }

// Exit tells how the machine ended, after Done.
func (v *vm) Exit() vmm.Exit {
	select {
	case <-v.done:
		return v.m.exit
	default:
		return vmm.Exit{}
	}
}

// DialLink makes a new link.
func (v *vm) DialLink(ctx context.Context) (net.Conn, error) {
	err := v.held()
	if err == nil {
		err = v.m.hold(ctx) // for a Save
	}
	var conn net.Conn
	if err == nil {
		conn, err = v.m.link()
		v.m.release()
	}
	if err != nil {
		return nil, fmt.Errorf("link of %s: %w", v.m.Spec.ID, err)
	}
	return conn, nil
}

// Close lets go of the machine.
func (v *vm) Close() error {
	v.mu.Lock()
	first := !v.closed
	v.closed = true
	v.mu.Unlock()
	if first {
		close(v.closing)
		<-v.watched
		v.m.mu.Lock()
		v.m.dropLinkLocked()
		v.m.mu.Unlock()
	}
	return nil
}
