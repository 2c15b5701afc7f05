package fake

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Machine is what a VMM process would be. Tests use its methods to do to it
// what guests and hosts do. It is safe for concurrent use.
type Machine struct {
	Spec    vmm.Spec
	host    *Host
	process sandbox.Process
	console *proc.CappedFile
	ram     *RAM
	still   chan struct{} // holds a token while nothing may change the guest, or something does
	done    chan struct{} // closed when it has ended
	exit    vmm.Exit      // set before done is closed

	mu      sync.Mutex
	running bool          // guarded by mu
	full    chan struct{} // closed when the disk was full; guarded by mu
	hung    chan struct{} // open while it hangs; guarded by mu
	links   [2]net.Conn   // hutchd's and the guest's side; guarded by mu
	over    bool          // guarded by mu
}

// Process is the machine's made-up identity.
func (m *Machine) Process() sandbox.Process { return m.process }

// RAM is the guest's memory. It is gone with the machine.
func (m *Machine) RAM() *RAM { return m.ram }

// Write writes to the guest's console.
func (m *Machine) Write(p []byte) (int, error) { return m.console.Write(p) }

// End ends the machine for a reason. Only the first end counts.
func (m *Machine) End(e vmm.Exit) {
	m.mu.Lock()
	if m.over {
		m.mu.Unlock()
		return
	}
	m.over = true
	m.dropLinkLocked()
	m.exit = e
	m.mu.Unlock()
	m.host.mu.Lock()
	delete(m.host.machines, m.process.PID)
	m.host.ended[m.process.PID] = m
	m.host.mu.Unlock()
	m.console.Close()
	m.ram.close()
	close(m.done)
}

// Crash ends the machine as SIGKILL from outside does.
func (m *Machine) Crash() {
	m.End(vmm.Exit{Reason: vmm.Crashed, Detail: "fake ended by signal SIGKILL"})
}

// Fill stops the machine as a VMM does whose host has no room for what the guest
// writes. A Resume goes on.
func (m *Machine) Fill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.running = false
	select {
	case <-m.full:
	default:
		close(m.full)
	}
}

// refillLocked makes another channel for the next time.
func (m *Machine) refillLocked() {
	select {
	case <-m.full:
		m.full = make(chan struct{})
	default:
	}
}

// Hang makes everything but Kill wait until the caller's context ends or
// Unhang is called.
func (m *Machine) Hang() {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.hung:
		m.hung = make(chan struct{})
	default:
	}
}

// Unhang ends a Hang.
func (m *Machine) Unhang() {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.hung:
	default:
		close(m.hung)
	}
}

// ready waits while the machine hangs.
func (m *Machine) ready(ctx context.Context) error {
	m.mu.Lock()
	hung := m.hung
	m.mu.Unlock()
	select {
	case <-m.done:
		return fault.New(fault.Unavailable, "the machine is gone: %s", m.exit.Detail)
	default:
	}
	select {
	case <-hung:
		return nil
	case <-m.done:
		return fault.New(fault.Unavailable, "the machine is gone: %s", m.exit.Detail)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dropLinkLocked closes both sides of the link.
func (m *Machine) dropLinkLocked() {
	for i, c := range m.links {
		if c != nil {
			c.Close()
		}
		m.links[i] = nil
	}
}

// link makes a new link in place of the one before.
func (m *Machine) link() (net.Conn, error) {
	ours, guests, err := socketPair()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		ours.Close()
		guests.Close()
		return nil, fault.New(fault.Unavailable, "the machine is gone")
	}
	m.dropLinkLocked()
	m.links = [2]net.Conn{ours, guests}
	if f := m.host.params.OnLink; f != nil {
		m.host.guests.Go(func() { f(m, guests) })
	}
	return ours, nil
}

// socketPair has buffers as a real link, which net.Pipe has not.
func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make link: %w", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "link")
		c, ferr := net.FileConn(f)
		f.Close()
		if ferr != nil {
			err = fmt.Errorf("make link: %w", ferr)
			continue
		}
		conns[i] = c
	}
	if err != nil {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, err
	}
	return conns[0], conns[1], nil
}
