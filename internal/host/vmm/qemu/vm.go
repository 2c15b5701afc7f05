package qemu

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// lastWordsTime bounds reading what a dead QEMU left in its sockets. Their
// ends are there already, unless QEMU was taken over and gave one away.
const lastWordsTime = 2 * time.Second

// vm is one QEMU.
type vm struct {
	driver  *Driver
	spec    vmm.Spec
	accel   string
	proc    *proc.Process
	console console

	dialing chan struct{} // holds a token while control is made
	still   chan struct{} // holds a token while nothing may change the guest, or something does
	loaded  chan string   // how a load ended; has room for it

	mu       sync.Mutex
	control  *qmp.Client   // nil: none yet; guarded by mu
	tty      net.Conn      // of the console; guarded by mu
	ttyEnd   chan struct{} // closed when tty is read to its end; guarded by mu
	link     net.Conn      // guarded by mu
	stale    []int         // sets of files that saves left in QEMU; guarded by mu
	shutdown string        // the first reason told; guarded by mu
	full     chan struct{} // see DiskFull; guarded by mu
	killed   bool          // guarded by mu
	closed   bool          // guarded by mu

	closing   chan struct{} // closed by Close
	closeOnce sync.Once
	done      chan struct{} // closed when QEMU is gone
	watched   chan struct{} // closed when the watcher has ended
	exit      vmm.Exit      // set before done is closed
}

var (
	_ vmm.VM    = (*vm)(nil)
	_ vmm.Saver = (*vm)(nil)
)

// begin connects everything, then starts the vCPUs, or loads the state from the
// descriptor state when there is one.
func (v *vm) begin(ctx context.Context, state int) error {
	if err := v.connect(ctx); err != nil {
		return err
	}
	if state != 0 {
		return v.load(ctx, state)
	}
	return v.command(ctx, "cont", nil)
}

// connect connects the machine protocol and the console.
func (v *vm) connect(ctx context.Context) error {
	if _, err := v.client(ctx); err != nil {
		return err
	}
	conn, err := dial(ctx, socketPath(v.spec.Dir, consoleSocket))
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed || v.tty != nil {
		return conn.Close()
	}
	end := make(chan struct{})
	v.tty, v.ttyEnd = conn, end
	go func() {
		defer close(end)
		v.console.copy(conn, v.closing)
	}()
	return nil
}

// client returns the connection of the machine protocol, and makes a new one
// when there is none or it was lost. One is made at a time: QEMU serves one.
func (v *vm) client(ctx context.Context) (*qmp.Client, error) {
	short, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	c, err := v.dialControl(short)
	if err != nil && ctx.Err() == nil && !fault.Is(err, fault.Unavailable) {
		err = fault.As(fault.Unavailable, err) // QEMU does not answer
	}
	return c, err
}

func (v *vm) dialControl(ctx context.Context) (*qmp.Client, error) {
	select {
	case v.dialing <- struct{}{}:
		defer func() { <-v.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	v.mu.Lock()
	c, closed := v.control, v.closed
	v.mu.Unlock()
	if closed {
		return nil, fault.New(fault.Unavailable, "machine %s is let go of: %w", v.spec.ID, os.ErrClosed)
	}
	if c != nil {
		select {
		case <-c.Done():
		default:
			return c, nil
		}
	}
	conn, err := dial(ctx, socketPath(v.spec.Dir, controlSocket))
	if err != nil {
		return nil, err
	}
	v.trimJournal() // of what came while nobody was connected
	c, err = qmp.New(ctx, conn, v.onEvent)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	if closed = v.closed; !closed {
		v.control = c
	}
	v.mu.Unlock()
	if closed {
		c.Close()
		return nil, fault.New(fault.Unavailable, "machine %s is let go of: %w", v.spec.ID, os.ErrClosed)
	}
	return c, nil
}

func (v *vm) onEvent(e qmp.Event) {
	if stoppedForRoom(e) {
		v.setFull(true)
	}
	if status := loadEnd(e); status != "" {
		select {
		case v.loaded <- status:
		default: // the first one counts
		}
	}
	reason := shutdownReason(e)
	if reason == "" {
		v.trimJournal()
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.shutdown == "" {
		v.shutdown = reason
	}
}

// trimJournal bounds the journal: a guest can make QEMU tell of something about
// once a second.
func (v *vm) trimJournal() {
	if err := trimJournal(journalPath(v.spec)); err != nil {
		v.driver.logger.Warn("journal of a machine grows", "sandbox_id", v.spec.ID, "error", err)
	}
}

// command runs a command of the machine protocol.
func (v *vm) command(ctx context.Context, name string, result any) error {
	c, err := v.client(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	return c.Execute(ctx, name, nil, result)
}

// explain adds the last words of a QEMU that is gone, or is about to be.
func (v *vm) explain(ctx context.Context, err error) error {
	if !fault.Is(err, fault.Unavailable) {
		return err
	}
	// A lost connection comes a moment before the end of its process.
	ctx, cancel := context.WithTimeout(ctx, lastWordsTime)
	defer cancel()
	select {
	case <-v.done:
		return fault.New(fault.Unavailable, "the machine is gone: %s", v.exit.Detail)
	case <-ctx.Done():
		return err
	}
}

// Machine is what Adopt needs.
func (v *vm) Machine() sandbox.Machine {
	return sandbox.Machine{Driver: DriverName, Accel: v.accel, Process: v.proc.ID(), UID: v.spec.UID}
}

// Pause stops the vCPUs. QEMU answers when they stand.
func (v *vm) Pause(ctx context.Context) error {
	if err := v.command(ctx, "stop", nil); err != nil {
		return fmt.Errorf("pause %s: %w", v.spec.ID, v.explain(ctx, err))
	}
	return nil
}

// Resume starts the vCPUs, after a Save that is going on.
func (v *vm) Resume(ctx context.Context) error {
	if err := v.resume(ctx); err != nil {
		return fmt.Errorf("resume %s: %w", v.spec.ID, v.explain(ctx, err))
	}
	return nil
}

func (v *vm) resume(ctx context.Context) error {
	if err := v.hold(ctx); err != nil {
		return err
	}
	defer v.release()
	c, err := v.client(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	wasFull := v.setFull(false) // before it can be full again
	if err := c.Execute(ctx, "cont", nil, nil); err != nil {
		v.setFull(wasFull)
		return err
	}
	v.dropStale(ctx, c)
	return nil
}

// Running asks QEMU.
func (v *vm) Running(ctx context.Context) (bool, error) {
	s, err := v.status(ctx)
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", v.spec.ID, v.explain(ctx, err))
	}
	return s.Running, nil
}

// runStatus is what QEMU says of the vCPUs.
type runStatus struct {
	Running bool   `json:"running"`
	Status  string `json:"status"`
}

func (v *vm) status(ctx context.Context) (s runStatus, err error) {
	return s, v.command(ctx, "query-status", &s)
}

// DiskFull tells what QEMU's events told; see vmm.VM.
func (v *vm) DiskFull() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.full
}

// setFull notes whether the host's disk is full, and returns whether it was.
func (v *vm) setFull(full bool) (before bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-v.full:
		before = true
	default:
	}
	switch {
	case full && !before:
		close(v.full)
	case !full && before:
		v.full = make(chan struct{})
	}
	return before
}

// Kill ends QEMU; see vmm.VM.
func (v *vm) Kill(ctx context.Context) error {
	select {
	case <-v.done:
		return nil
	default:
	}
	v.mu.Lock()
	v.killed = true
	v.mu.Unlock()
	if err := v.proc.Kill(ctx); err != nil {
		return fmt.Errorf("kill %s: %w", v.spec.ID, err)
	}
	select {
	case <-v.done:
		return nil
	case <-v.watched:
	case <-ctx.Done():
		return fmt.Errorf("kill %s: %w", v.spec.ID, ctx.Err())
	}
	select {
	case <-v.done:
		return nil
	default:
		return fmt.Errorf("kill %s: %w", v.spec.ID, os.ErrClosed)
	}
}

// Done is closed when QEMU is gone.
func (v *vm) Done() <-chan struct{} { return v.done }

// Exit tells how QEMU ended, after Done.
func (v *vm) Exit() vmm.Exit {
	select {
	case <-v.done:
		return v.exit
	default:
		return vmm.Exit{}
	}
}

// DialLink connects to the guest's port; see vmm.VM. QEMU accepts one client
// at a time, so the one before is closed first. It tells the guest, so that it
// has to wait for a Save.
func (v *vm) DialLink(ctx context.Context) (net.Conn, error) {
	if err := v.hold(ctx); err != nil {
		return nil, fmt.Errorf("link of %s: %w", v.spec.ID, err)
	}
	defer v.release()
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-v.done:
		return nil, fault.New(fault.Unavailable, "link of %s: the machine is gone", v.spec.ID)
	default:
	}
	if v.closed {
		return nil, fault.New(fault.Unavailable, "link of %s: the machine is let go of: %w", v.spec.ID, os.ErrClosed)
	}
	if v.link != nil {
		v.link.Close()
		v.link = nil
	}
	// Connecting to a listening local socket does not wait.
	conn, err := dial(ctx, socketPath(v.spec.Dir, linkSocket))
	if err != nil {
		return nil, fault.New(fault.Unavailable, "link of %s: %w", v.spec.ID, err)
	}
	v.link = conn
	return conn, nil
}

// watch waits for the end of QEMU, or for Close.
func (v *vm) watch(ctx context.Context) {
	defer close(v.watched)
	select {
	case <-v.proc.Done():
	case <-v.closing:
		return
	}
	v.lastWords()
	ctx, cancel := undo.Detach(ctx)
	defer cancel()
	e := ending{
		panic: v.console.panicText(), exit: v.proc.Exit(), words: v.proc.LastWords(),
		oomKills: v.driver.params.Jail.OOMKills(string(v.spec.ID)),
		memoryMB: v.spec.MemoryMB + v.driver.caps.MemoryOverheadMB,
	}
	v.mu.Lock()
	e.shutdown, e.killed = v.shutdown, v.killed
	v.mu.Unlock()
	v.exit = classify(e)
	if err := v.driver.removeRest(ctx, v.spec); err != nil {
		v.driver.logger.Warn("something of an ended machine is left", "sandbox_id", v.spec.ID, "error", err)
	}
	v.hangUp()
	close(v.done)
}

// lastWords waits until the events and the console are read to their ends.
func (v *vm) lastWords() {
	patience := time.AfterFunc(lastWordsTime, v.hangUp)
	defer patience.Stop()
	v.mu.Lock()
	c := v.control
	v.mu.Unlock()
	if c != nil {
		<-c.Done()
	}
	v.waitConsole()
}

func (v *vm) waitConsole() {
	v.mu.Lock()
	end := v.ttyEnd
	v.mu.Unlock()
	if end != nil {
		<-end
	}
}

// hangUp closes all connections.
func (v *vm) hangUp() {
	v.mu.Lock()
	c, conns := v.control, []net.Conn{v.tty, v.link}
	v.mu.Unlock()
	for _, conn := range conns {
		if conn != nil {
			conn.Close()
		}
	}
	if c != nil {
		c.Close()
	}
}

// Close lets go of QEMU; see vmm.VM.
func (v *vm) Close() error {
	v.closeOnce.Do(func() {
		v.mu.Lock()
		v.closed = true
		v.mu.Unlock()
		close(v.closing)
		v.hangUp()
		<-v.watched
		v.waitConsole()
		v.proc.Close()
		if err := v.console.log.Err(); err != nil {
			v.driver.logger.Warn("console log lost words", "sandbox_id", v.spec.ID, "error", err)
		}
		v.console.log.Close()
	})
	return nil
}

func dupFile(fd uintptr, name string) (*os.File, error) {
	dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(dup), name), nil
}
