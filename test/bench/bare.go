package main

import (
	"bufio"
	"context"
	"encoding/json"
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
	scratch string
}

// bare is one running bare machine.
type bare struct {
	dir   string
	argv  []string
	took  time.Duration // from the start of QEMU to the first answer
	cmd   *exec.Cmd
	ended chan struct{}
	link  net.Conn
	in    *bufio.Reader
	qmp   *monitor
}

// bareArgs turns the command line of a sandbox's QEMU into that of the floor:
// the same machine, processor, memory and devices, but with files and sockets
// by path instead of descriptors, without what confines and names the
// process, and with a network card that is connected to nothing.
func bareArgs(p barePlan, dir string) ([]string, error) {
	var out []string
	serials, err := diskSerials(p.argv)
	if err != nil {
		return nil, err
	}
	for i := 1; i < len(p.argv); i++ {
		flag := p.argv[i]
		if flag == "-S" {
			continue // hutch starts the machine by QMP
		}
		if !strings.HasPrefix(flag, "-") || i+1 == len(p.argv) || strings.HasPrefix(p.argv[i+1], "-") {
			out = append(out, flag) // a flag without a value
			continue
		}
		i++
		value := p.argv[i]
		switch flag {
		case "-name", "-sandbox", "-msg", "-add-fd":
			continue
		case "-kernel":
			value = p.kernel
		case "-initrd":
			value = p.initrd
		case "-chardev":
			value = bareChardev(value, dir)
		case "-netdev":
			value = "hubport,id=net,hubid=0"
		case "-blockdev":
			value, err = bareBlockdev(value, serials, p.disks)
			if err != nil {
				return nil, err
			}
		}
		out = append(out, flag, value)
	}
	return append([]string{p.argv[0]}, out...), nil
}

// bareChardev gives sockets a path, and puts the console into a file.
func bareChardev(value, dir string) string {
	id := option(value, "id")
	if id == "console" {
		return "file,id=console,path=" + filepath.Join(dir, "console.log")
	}
	return fmt.Sprintf("socket,id=%s,path=%s,server=on,wait=off", id, filepath.Join(dir, id+".sock"))
}

// bareBlockdev names the file that stood behind a descriptor set.
func bareBlockdev(value string, serials, disks map[string]string) (string, error) {
	name := option(value, "filename")
	if name == "" {
		return value, nil // the raw layer on top
	}
	node := strings.TrimSuffix(option(value, "node-name"), "-file")
	path, ok := disks[serials[node]]
	if !ok {
		return "", fmt.Errorf("no file for disk %s (serial %q)", node, serials[node])
	}
	return strings.Replace(value, "filename="+name, "filename="+path, 1), nil
}

// diskSerials maps the block nodes of a command line to the disks' serials.
func diskSerials(argv []string) (map[string]string, error) {
	serials := map[string]string{}
	for _, a := range argv {
		if strings.HasPrefix(a, "virtio-blk-pci,") {
			serials[option(a, "drive")] = option(a, "serial")
		}
	}
	if len(serials) == 0 {
		return nil, errors.New("no disks in the sandbox's command line")
	}
	return serials, nil
}

// option returns the value of a key in QEMU's "a,key=value,…" form.
func option(value, key string) string {
	for _, field := range strings.Split(value, ",") {
		if v, ok := strings.CutPrefix(field, key+"="); ok {
			return v
		}
	}
	return ""
}

// startBare copies the blank data disk, starts QEMU, connects to it, and
// returns when the guest has answered its first ping. The floor of a create is
// all of that but the copy, see bare.took. The caller ends it.
func startBare(ctx context.Context, p barePlan) (*bare, error) {
	dir, err := os.MkdirTemp(p.scratch, "bare-")
	if err != nil {
		return nil, err
	}
	b := &bare{dir: dir, ended: make(chan struct{})}
	if err := b.start(ctx, p); err != nil {
		tail, _ := os.ReadFile(filepath.Join(dir, "console.log"))
		said, _ := os.ReadFile(filepath.Join(dir, "qemu.log"))
		err = fmt.Errorf("bare machine: %w; QEMU said %q, the console ends:\n%s", err, said, tail[max(0, len(tail)-2000):])
		return nil, errors.Join(err, b.end())
	}
	return b, nil
}

func (b *bare) start(ctx context.Context, p barePlan) error {
	data := filepath.Join(b.dir, "data.img")
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", p.disks["data"], data).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the data disk: %w: %s", err, out)
	}
	p.disks = map[string]string{"root": p.disks["root"], "modules": p.disks["modules"], "data": data}
	var err error
	if b.argv, err = bareArgs(p, b.dir); err != nil {
		return err
	}
	b.cmd = exec.Command(b.argv[0], b.argv[1:]...)
	log, err := os.Create(filepath.Join(b.dir, "qemu.log"))
	if err != nil {
		return err
	}
	b.cmd.Stdout, b.cmd.Stderr = log, log
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	began := time.Now()
	err = b.cmd.Start()
	log.Close()
	if err != nil {
		b.cmd = nil
		return fmt.Errorf("start: %w", err)
	}
	go func() { _ = b.cmd.Wait(); close(b.ended) }() // waited for in end
	if b.link, err = b.dial(ctx, "link"); err != nil {
		return err
	}
	b.in = bufio.NewReaderSize(b.link, 256<<10)
	answer, err := b.ask("ping")
	b.took = time.Since(began)
	if err != nil {
		return err
	}
	if answer != "pong" {
		return fmt.Errorf("first ping: answered %q", answer)
	}
	return nil
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

// stopContinue stops the machine and lets it run again, over QMP.
func (b *bare) stopContinue(ctx context.Context) error {
	if b.qmp == nil {
		conn, err := b.dial(ctx, "control")
		if err != nil {
			return err
		}
		if b.qmp, err = newMonitor(conn); err != nil {
			return err
		}
	}
	return errors.Join(b.qmp.do("stop"), b.qmp.do("cont"))
}

// end kills the machine and removes what it had.
func (b *bare) end() error {
	if b.link != nil {
		b.link.Close()
	}
	if b.qmp != nil {
		b.qmp.conn.Close()
	}
	if b.cmd != nil {
		if err := b.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-b.ended
	}
	return os.RemoveAll(b.dir)
}

// monitor speaks QMP; see QEMU's interop/qmp-spec.
type monitor struct {
	conn net.Conn
	in   *json.Decoder
}

func newMonitor(conn net.Conn) (*monitor, error) {
	m := &monitor{conn, json.NewDecoder(conn)}
	var greeting map[string]any
	if err := m.in.Decode(&greeting); err != nil {
		return nil, fmt.Errorf("QMP greeting: %w", err)
	}
	return m, m.do("qmp_capabilities")
}

// do runs a command and returns when it is answered; events are skipped.
func (m *monitor) do(command string) error {
	if err := m.conn.SetDeadline(time.Now().Add(bareTimeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(m.conn, "{\"execute\":%q}\n", command); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	for {
		var reply struct {
			Event  string          `json:"event"`
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := m.in.Decode(&reply); err != nil {
			return fmt.Errorf("QMP %s: %w", command, err)
		}
		switch {
		case reply.Error != nil:
			return fmt.Errorf("QMP %s: %s", command, reply.Error)
		case reply.Event == "":
			return nil
		}
	}
}
