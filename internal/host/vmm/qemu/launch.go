package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/proc"
	"github.com/hutch-run/hutch/internal/sandbox"
	"github.com/hutch-run/hutch/internal/undo"
)

// Launch starts a machine; see vmm.Driver. The logs of a failed launch stay,
// for people.
func (d *Driver) Launch(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("launch %s: %w", spec.ID, err)
	}
	var undos undo.Stack
	v, err := d.launch(ctx, spec, nil, &undos)
	if err != nil {
		return nil, fmt.Errorf("launch %s: %w", spec.ID, errors.Join(err, undos.Run(ctx)))
	}
	undos.Release()
	return v, nil
}

// launch starts a machine, which boots and runs, or is restored from something
// and stands.
func (d *Driver) launch(ctx context.Context, spec vmm.Spec, from *source, undos *undo.Stack) (*vm, error) {
	files := fileSet{first: proc.FirstFD}
	defer files.close()
	args, err := d.open(ctx, spec, from, &files, undos)
	if err != nil {
		return nil, err
	}
	state := 0
	if from != nil {
		f, err := sealedFile("state", from.devices)
		if err != nil {
			return nil, err
		}
		state = files.add(f)
	}
	p, report, err := d.params.Jail.Start(ctx, d.cell(spec, buildArgs(args), files))
	if err != nil {
		return nil, err
	}
	// Only QEMU holds the listening sockets now: when it dies, so do they.
	files.close()
	for _, m := range report.Missing {
		d.logger.Debug("confinement is not complete", "sandbox_id", spec.ID, "missing", m)
	}
	v, err := d.newVM(ctx, spec, p)
	if err != nil {
		undos.Add("process", func(ctx context.Context) error {
			return errors.Join(p.Kill(ctx), p.Close(), d.params.Jail.Remove(ctx, string(spec.ID)))
		})
		return nil, err
	}
	undos.Add("process", func(ctx context.Context) error { return errors.Join(v.Kill(ctx), v.Close()) })
	if err := v.begin(ctx, state); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err() // whatever it broke on the way
		}
		return nil, fault.As(fault.Internal, v.explain(ctx, err))
	}
	return v, nil
}

// open opens all that QEMU is given. A restored machine needs nothing to boot.
func (d *Driver) open(ctx context.Context, spec vmm.Spec, from *source, files *fileSet, undos *undo.Stack) (argParams, error) {
	p := argParams{
		Name: string(spec.ID), Accel: Accel(d.caps.Accel), VCPUs: spec.VCPUs, MemoryMB: spec.MemoryMB, Cmdline: spec.Cmdline,
	}
	for _, s := range []struct {
		name string
		fd   *int
	}{{controlSocket, &p.ControlFD}, {consoleSocket, &p.ConsoleFD}, {linkSocket, &p.LinkFD}} {
		path := socketPath(spec.Dir, s.name)
		f, err := listen(ctx, path)
		if err != nil {
			return p, err
		}
		undos.Add("socket", func(context.Context) error { return removeSocket(path) })
		*s.fd = files.add(f)
	}
	journal, err := createJournal(journalPath(spec))
	if err != nil {
		return p, err
	}
	p.JournalFD = files.add(journal)
	if err := openMemory(&p, spec, from, files); err != nil {
		return p, err
	}
	if from == nil {
		if err := openBoot(&p, spec, files); err != nil {
			return p, err
		}
	}
	for _, disk := range spec.Disks {
		f, err := openDisk(disk.Path, disk.ReadOnly)
		if err != nil {
			return p, err
		}
		p.Disks = append(p.Disks, argDisk{FD: files.add(f), Serial: disk.Serial, ReadOnly: disk.ReadOnly, Discard: disk.Discard})
	}
	for _, share := range spec.Shares {
		conn, err := duplicate(share.Conn, "share")
		if err != nil {
			return p, err
		}
		p.Shares = append(p.Shares, argShare{FD: files.add(conn), Tag: share.Tag})
	}
	if spec.NIC != nil {
		tap, err := duplicate(spec.NIC.Tap, "tap")
		if err != nil {
			return p, err
		}
		p.NIC = &argNIC{FD: files.add(tap), MAC: strings.ToLower(spec.NIC.MAC)}
	}
	return p, nil
}

// openBoot adds the kernel and what belongs to it.
func openBoot(p *argParams, spec vmm.Spec, files *fileSet) error {
	kernel, err := openFor(spec.UID, "kernel", spec.Kernel)
	if err != nil {
		return err
	}
	p.KernelFD = files.add(kernel)
	if spec.Initrd == "" {
		return nil
	}
	initrd, err := openFor(spec.UID, "initrd", spec.Initrd)
	if err != nil {
		return err
	}
	p.InitrdFD = files.add(initrd)
	return nil
}

func (d *Driver) cell(spec vmm.Spec, args []string, files fileSet) jail.Cell {
	c := jail.Cell{
		Name: string(spec.ID), UID: spec.UID, Netns: spec.Netns, Hide: d.params.Hide,
		MemoryMB: spec.MemoryMB + d.caps.MemoryOverheadMB, CPUs: spec.VCPUs,
		PIDs: spec.VCPUs + ioThreads + otherThreads, OpenFiles: openFilesLimit,
		Program: proc.Params{
			Path: d.params.Binary, Args: args, Files: files.files,
			Log: spec.VMMLog, LogMax: d.params.LogMax, Logger: d.logger,
		},
	}
	if d.caps.Accel == string(KVM) {
		c.Devices = []string{kvmDevice}
	}
	return c
}

// Adopt takes up a machine; see vmm.Driver. What a machine that is gone left
// in spec.Dir and in its cgroup is removed, when what it tells was read.
func (d *Driver) Adopt(ctx context.Context, m sandbox.Machine, spec vmm.Spec) (vmm.VM, error) {
	if err := spec.CheckAdopted(); err != nil {
		return nil, fmt.Errorf("adopt: %w", err)
	}
	if m.Driver != DriverName {
		return nil, fmt.Errorf("adopt %s: %w", spec.ID, fault.BadField("driver", "a machine of %q is not QEMU's", m.Driver))
	}
	p, err := proc.Adopt(ctx, m.Process, proc.AdoptParams{Log: spec.VMMLog, LogMax: d.params.LogMax, Logger: d.logger})
	if fault.Is(err, fault.NotFound) {
		return nil, fmt.Errorf("adopt %s: %w", spec.ID, d.gone(ctx, spec, err))
	}
	if err != nil {
		return nil, fmt.Errorf("adopt %s: %w", spec.ID, err)
	}
	v, err := d.newVM(ctx, spec, p)
	if err != nil {
		return nil, fmt.Errorf("adopt %s: %w", spec.ID, errors.Join(err, p.Close()))
	}
	v.accel = m.Accel
	if err := v.connect(ctx); err != nil {
		// It can still be ended, and its exit is still seen. The next call that
		// needs it tries again.
		d.logger.Warn("adopted QEMU does not answer", "sandbox_id", spec.ID, "error", err)
		return v, nil
	}
	if s, err := v.status(ctx); err == nil && s.Status == "io-error" { // its event came while nobody was there
		v.setFull(true)
	}
	return v, nil
}

// gone is the error of an Adopt that found no process, for err.
func (d *Driver) gone(ctx context.Context, spec vmm.Spec, err error) error {
	exit, lostErr := d.lost(spec)
	if lostErr == nil {
		err = &vmm.Gone{Exit: exit, Err: err}
	} else if !errors.Is(lostErr, fs.ErrNotExist) {
		err = errors.Join(err, lostErr)
	}
	return errors.Join(err, d.removeRest(ctx, spec))
}

// removeRest removes what a machine that is gone left behind.
func (d *Driver) removeRest(ctx context.Context, spec vmm.Spec) error {
	ctx, cancel := undo.Detach(ctx)
	defer cancel()
	return errors.Join(d.params.Jail.Remove(ctx, string(spec.ID)), removeSockets(spec.Dir))
}

// newVM makes the VM of a running QEMU. On error the process is the caller's.
func (d *Driver) newVM(ctx context.Context, spec vmm.Spec, p *proc.Process) (*vm, error) {
	log, err := proc.CreateCapped(spec.ConsoleLog, d.params.LogMax)
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	v := &vm{
		driver: d, spec: spec, accel: d.caps.Accel, proc: p,
		console: console{log: log},
		full:    make(chan struct{}), dialing: make(chan struct{}, 1), still: make(chan struct{}, 1), loaded: make(chan string, 1),
		closing: make(chan struct{}), done: make(chan struct{}), watched: make(chan struct{}),
	}
	v.spec.NIC = nil // the caller closes its tap
	v.spec.Shares = slices.Clone(spec.Shares)
	for i := range v.spec.Shares {
		v.spec.Shares[i].Conn = nil // as well
	}
	// The machine outlives the call that launched it.
	go v.watch(context.WithoutCancel(ctx))
	return v, nil
}
