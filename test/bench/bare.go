package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hutch-run/hutch/internal/host/vmm/qemu/ram"
)

// bareTimeout bounds every wait for a bare guest.
const bareTimeout = 2 * time.Minute

// barePlan is how to start the bare machine of the floor.
type barePlan struct {
	argv    []string          // hutch's own, of a sandbox that ran
	kernel  string            // path
	initrd  string            // path
	pack    string            // directory of the kernel pack
	disks   map[string]string // path by serial; the data disk is a fresh copy for each machine
	memory  int64             // bytes
	scratch string
	from    *bareSaved // nil: it boots
}

// bare is one running bare machine.
type bare struct {
	dir    string
	argv   []string
	memory int64         // bytes
	took   time.Duration // from the start of QEMU to the first answer
	cmd    *exec.Cmd
	ended  chan struct{}
	link   net.Conn
	in     *bufio.Reader
	qmp    *monitor
}

// startBare copies the data disk, starts QEMU, connects to it, and returns when
// the guest has answered its first request: a ping after a boot, the run of
// /bin/true after a restore. The floor is all of that but the copy, see
// bare.took. The caller ends it.
func startBare(ctx context.Context, p barePlan) (*bare, error) {
	dir, err := os.MkdirTemp(p.scratch, "bare-")
	if err != nil {
		return nil, err
	}
	b := &bare{dir: dir, memory: p.memory, ended: make(chan struct{})}
	if err := b.start(ctx, p); err != nil {
		tail, _ := os.ReadFile(filepath.Join(dir, "console.log"))
		said, _ := os.ReadFile(filepath.Join(dir, "qemu.log"))
		err = fmt.Errorf("bare machine: %w; QEMU said %q, the console ends:\n%s", err, said, tail[max(0, len(tail)-2000):])
		return nil, errors.Join(err, b.end())
	}
	return b, nil
}

func (b *bare) start(ctx context.Context, p barePlan) error {
	files, err := b.open(p)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return err
	}
	blank := p.disks["data"]
	if p.from != nil {
		blank = p.from.data
	}
	data := filepath.Join(b.dir, dataImage)
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", blank, data).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the data disk: %w: %s", err, out)
	}
	p.disks = map[string]string{"root": p.disks["root"], "modules": p.disks["modules"], "data": data}
	if b.argv, err = bareArgs(p, b.dir); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(b.dir, "qemu.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command(b.argv[0], b.argv[1:]...)
	c.Stdout, c.Stderr, c.ExtraFiles = log, log, files
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	began := time.Now()
	if err := c.Start(); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	b.cmd = c
	go func() { _ = c.Wait(); close(b.ended) }() // waited for in end
	request, want := "ping", "pong"
	if p.from != nil {
		request, want = "exec /bin/true", "exit 0"
	}
	err = b.first(ctx, request, want)
	b.took = time.Since(began)
	return err
}

// dataImage is the data disk in a machine's directory.
const dataImage = "data.img"

// The descriptors that QEMU is given.
const (
	bareMemoryFD = 3
	bareStateFD  = 4
)

// open opens what QEMU gets as descriptors, which the caller closes: its memory,
// and the state it is restored from.
func (b *bare) open(p barePlan) ([]*os.File, error) {
	if p.from == nil {
		memory, err := ram.New(p.memory, os.Geteuid())
		return []*os.File{memory}, err
	}
	memory, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", p.from.memory.Fd()), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	state, err := os.Open(p.from.state)
	if err != nil {
		return []*os.File{memory}, err
	}
	return []*os.File{memory, state}, nil
}

// first connects to the guest and asks it something.
func (b *bare) first(ctx context.Context, request, want string) error {
	var err error
	if b.link, err = b.dial(ctx, "link"); err != nil {
		return err
	}
	b.in = bufio.NewReaderSize(b.link, 256<<10)
	answer, err := b.ask(request)
	if err == nil && answer != want {
		err = fmt.Errorf("answered %q to its first request, %q", answer, request)
	}
	return err
}

// dial connects to one of QEMU's sockets, which are there a few milliseconds
// after its start.
func (b *bare) dial(ctx context.Context, name string) (net.Conn, error) {
	path := filepath.Join(b.dir, name+".sock")
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn, nil
		}
		select {
		case <-tick.C:
		case <-b.ended:
			log, _ := os.ReadFile(filepath.Join(b.dir, "qemu.log"))
			return nil, fmt.Errorf("QEMU ended: %s", log)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// ask sends one line and returns the line that answers it.
func (b *bare) ask(request string) (string, error) {
	if err := b.link.SetDeadline(time.Now().Add(bareTimeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(b.link, request+"\n"); err != nil {
		return "", fmt.Errorf("ask %q: %w", request, err)
	}
	line, err := b.in.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("ask %q: %w", request, err)
	}
	return strings.TrimSpace(line), nil
}

// receive asks for the output of a program and reads n bytes of it.
func (b *bare) receive(request string, n int64) error {
	if err := b.link.SetDeadline(time.Now().Add(bareTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(b.link, request+"\n"); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, b.in, n)
	return err
}

// control returns the connection to QEMU's own protocol.
func (b *bare) control(ctx context.Context) (*monitor, error) {
	if b.qmp != nil {
		return b.qmp, nil
	}
	conn, err := b.dial(ctx, "control")
	if err != nil {
		return nil, err
	}
	b.qmp, err = newMonitor(conn)
	return b.qmp, err
}

// stopContinue stops the machine and lets it run again, over QMP.
func (b *bare) stopContinue(ctx context.Context) error {
	qmp, err := b.control(ctx)
	if err != nil {
		return err
	}
	return errors.Join(qmp.do("stop", nil, nil), qmp.do("cont", nil, nil))
}

// end kills the machine and removes what it had.
func (b *bare) end() error { return errors.Join(b.kill(), os.RemoveAll(b.dir)) }

// kill ends the machine's process, and returns when it is gone.
func (b *bare) kill() error {
	if b.link != nil {
		b.link.Close()
	}
	if b.qmp != nil {
		b.qmp.conn.Close()
	}
	if b.cmd == nil {
		return nil
	}
	if err := b.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-b.ended
	return nil
}
