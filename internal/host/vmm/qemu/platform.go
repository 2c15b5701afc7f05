package qemu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/proc"
)

// machineType is the alias whose versioned name a snapshot depends on.
const machineType = "q35"

// saveCommand saves devices without memory; see doc.go.
const saveCommand = "xen-save-devices-state"

// platform is what a guest sees of its QEMU.
type platform struct {
	Version string `json:"version"`
	Machine string `json:"machine"`
	Accel   string `json:"accel"`
	CPU     string `json:"cpu"`
}

// probe asks a QEMU without a machine what it is, confined as one with a
// machine. saves tells whether it can save machines.
func probe(ctx context.Context, j *jail.Jail, binary string, a Accel) (p platform, saves bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, proofTime)
	defer cancel()
	ours, theirs, err := controlPair()
	if err != nil {
		return p, false, err
	}
	defer theirs.Close()
	cell := jail.Cell{
		Name: fmt.Sprintf("probe-%d", os.Getpid()), UID: nobody,
		Program: proc.Params{Path: binary, Files: []*os.File{theirs}, Args: []string{
			"-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", string(a),
			"-chardev", fmt.Sprintf("socket,id=control,fd=%d", proc.FirstFD), "-mon", "chardev=control,mode=control",
		}},
	}
	if a == KVM {
		cell.Devices = []string{kvmDevice}
	}
	err = runProbe(ctx, j, cell, ours, func(c *qmp.Client) error {
		if p, err = askPlatform(ctx, c, string(a)); err != nil {
			return err
		}
		saves, err = hasCommand(ctx, c, saveCommand)
		return err
	})
	if err != nil {
		return p, false, fmt.Errorf("ask QEMU what machines it makes: %w", err)
	}
	return p, saves, nil
}

// runProbe runs ask on a QEMU that is there for nothing else.
func runProbe(ctx context.Context, j *jail.Jail, cell jail.Cell, ours net.Conn, ask func(*qmp.Client) error) (err error) {
	p, _, err := j.Start(ctx, cell)
	if err != nil {
		ours.Close()
		return err
	}
	cell.Program.Files[0].Close() // so that a dead QEMU ends the connection
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), proofTime)
		defer cancel()
		err = errors.Join(err, p.Kill(clean), p.Close(), j.Remove(clean, cell.Name))
	}()
	c, err := qmp.New(ctx, ours, nil)
	if err != nil {
		return errors.Join(err, wordsOf(p))
	}
	defer c.Close()
	return ask(c)
}

// wordsOf is the error that a program left, if any.
func wordsOf(p *proc.Process) error {
	if words := p.LastWords(); words != "" {
		return errors.New(words)
	}
	return nil
}

func controlPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a connection to QEMU: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make a connection to QEMU: %w", err), theirs.Close())
	}
	return conn, theirs, nil
}

// askPlatform asks a QEMU, with a machine or without.
func askPlatform(ctx context.Context, c *qmp.Client, accel string) (platform, error) {
	p := platform{Accel: accel}
	var version struct {
		QEMU struct{ Major, Minor, Micro int }
	}
	if err := c.Execute(ctx, "query-version", nil, &version); err != nil {
		return p, err
	}
	p.Version = fmt.Sprintf("%d.%d.%d", version.QEMU.Major, version.QEMU.Minor, version.QEMU.Micro)
	var machines []struct{ Name, Alias string }
	if err := c.Execute(ctx, "query-machines", nil, &machines); err != nil {
		return p, err
	}
	for _, m := range machines {
		if m.Alias == machineType {
			p.Machine = m.Name
		}
	}
	if p.Machine == "" {
		return p, fault.New(fault.Precondition, "QEMU makes no machine %q", machineType)
	}
	var err error
	p.CPU, err = askCPU(ctx, c, Accel(accel))
	return p, err
}

// askCPU describes the processor that guests get: its model as it was asked
// for, then every fact and every feature, in order.
func askCPU(ctx context.Context, c *qmp.Client, a Accel) (string, error) {
	type model struct {
		Name  string         `json:"name"`
		Props map[string]any `json:"props,omitempty"`
	}
	name, off := cpuModel(a)
	asked := model{Name: name, Props: map[string]any{}}
	for _, feature := range off {
		asked.Props[feature] = false
	}
	var answer struct{ Model model }
	arguments := struct {
		Type  string `json:"type"`
		Model model  `json:"model"`
	}{"static", asked}
	if err := c.Execute(ctx, "query-cpu-model-expansion", arguments, &answer); err != nil {
		return "", err
	}
	words := []string{cpuArg(a)}
	for _, k := range slices.Sorted(maps.Keys(answer.Model.Props)) {
		switch v := answer.Model.Props[k].(type) {
		case bool:
			if v {
				words = append(words, k)
			}
		case float64:
			words = append(words, fmt.Sprintf("%s=%.0f", k, v))
		case string:
			words = append(words, fmt.Sprintf("%s=%q", k, v))
		}
	}
	return strings.Join(words, " "), nil
}

func hasCommand(ctx context.Context, c *qmp.Client, name string) (bool, error) {
	var commands []struct{ Name string }
	if err := c.Execute(ctx, "query-commands", nil, &commands); err != nil {
		return false, err
	}
	return slices.ContainsFunc(commands, func(c struct{ Name string }) bool { return c.Name == name }), nil
}
