package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/ram"
	"github.com/hutch-run/hutch/internal/undo"
)

// Restore makes a saved machine go on; see vmm.Snapshotter. The logs of a
// failed restore stay, for people.
func (d *Driver) Restore(ctx context.Context, spec vmm.Spec, from vmm.Saved) (vmm.VM, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("restore %s: %w", spec.ID, err)
	}
	devices, err := d.checkSaved(spec, from)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", spec.ID, err)
	}
	var undos undo.Stack
	v, err := d.launch(ctx, spec, &source{from, devices}, &undos)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", spec.ID, errors.Join(err, undos.Run(ctx)))
	}
	undos.Release()
	return v, nil
}

// source is what a machine is restored from.
type source struct {
	vmm.Saved
	devices []byte
}

// checkSaved returns the devices of what was saved, when it is whole and fits.
func (d *Driver) checkSaved(spec vmm.Spec, from vmm.Saved) ([]byte, error) {
	if len(spec.Shares) > 0 {
		return nil, fault.BadField("shares", "a machine with shares always boots")
	}
	if from.State == nil || from.Memory == nil {
		return nil, fault.BadField("saved", "a state and a memory are needed")
	}
	h, devices, err := readState(from.State)
	if err != nil {
		return nil, fault.As(fault.Precondition, err)
	}
	if err := h.fits(spec, d.caps); err != nil {
		return nil, err
	}
	size := int64(spec.MemoryMB) << 20
	if from.Shared {
		err = ram.Own(from.Memory, size, spec.UID)
	} else {
		err = ram.CheckTemplate(from.Memory, size)
	}
	if err != nil {
		return nil, fault.As(fault.Precondition, err)
	}
	return devices, nil
}

// openMemory adds the memory of a machine: new, or what from has.
func openMemory(p *argParams, spec vmm.Spec, from *source, files *fileSet) error {
	if from == nil {
		f, err := ram.New(int64(spec.MemoryMB)<<20, spec.UID)
		if err != nil {
			return err
		}
		p.MemoryFD = files.add(f)
		return nil
	}
	memory, err := duplicate(from.Memory, "memory")
	if err != nil {
		return err
	}
	p.MemoryFD, p.Private = files.add(memory), !from.Shared
	return nil
}

// load makes a QEMU that waits for it take the devices from its descriptor fd.
func (v *vm) load(ctx context.Context, fd int) error {
	c, err := v.client(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	events := map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}}
	if err := c.Execute(ctx, "migrate-set-capabilities", events, nil); err != nil {
		return fmt.Errorf("load state: %w", err)
	}
	if err := c.Execute(ctx, "migrate-incoming", map[string]any{"uri": fmt.Sprintf("fd:%d", fd)}, nil); err != nil {
		return fmt.Errorf("load state: %w", err)
	}
	select {
	case status := <-v.loaded:
		if status != loadCompleted {
			return fault.New(fault.Unavailable, "load state: QEMU says it %s", status)
		}
		return nil
	case <-c.Done():
		// A QEMU that cannot load a state says why and exits.
		return fault.New(fault.Unavailable, "load state: QEMU hung up")
	case <-ctx.Done():
		return fmt.Errorf("load state: %w", ctx.Err())
	}
}

// How a load ends, as QEMU's MigrationStatus names it.
const (
	loadCompleted = "completed"
	loadFailed    = "failed"
)

// loadEnd returns how a load ended, "" for an event that does not say it.
func loadEnd(e qmp.Event) string {
	if e.Name != "MIGRATION" {
		return ""
	}
	var data struct {
		Status string `json:"status"`
	}
	if json.Unmarshal(e.Data, &data) != nil || data.Status != loadCompleted && data.Status != loadFailed {
		return ""
	}
	return data.Status
}

func duplicate(f *os.File, what string) (*os.File, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("take over %s: %w", what, err)
	}
	var dup *os.File
	var dupErr error
	err = conn.Control(func(fd uintptr) { dup, dupErr = dupFile(fd, what) })
	if err = errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("take over %s: %w", what, err)
	}
	return dup, nil
}
