package fake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
)

// machineType and cpu are what guests would see.
const (
	machineType = "fake-1.0"
	cpu         = "fake"
)

// state is a saved machine but for its memory. Its mark is its last field, so
// that a state that was cut has none.
type state struct {
	Version  int    `json:"version"`
	Machine  string `json:"machine"`
	VCPUs    int    `json:"vcpus"`
	MemoryMB int    `json:"memory_mb"`
	Mark     string `json:"mark"`
}

const (
	stateVersion = 1
	stateMark    = "the whole state of a fake machine"
	maxState     = 4096
)

// OnSave makes every later Save call f first, which may fail or wait. Nil takes
// it back.
func (h *Host) OnSave(f func(context.Context, *Machine) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.save = f
}

// OnRestore makes every later Restore call f first, which may fail or wait. Nil
// takes it back.
func (h *Host) OnRestore(f func(context.Context, vmm.Spec) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.restore = f
}

// Save saves the machine; see vmm.Saver.
func (v *vm) Save(ctx context.Context, to vmm.Files) (vmm.Stats, error) {
	stats, err := v.save(ctx, to)
	if err != nil {
		return stats, fmt.Errorf("save %s: %w", v.m.Spec.ID, err)
	}
	return stats, nil
}

func (v *vm) save(ctx context.Context, to vmm.Files) (stats vmm.Stats, err error) {
	m := v.m
	if err := m.hold(ctx); err != nil {
		return stats, err
	}
	defer m.release()
	running := false
	if err := v.do(ctx, "look at", func(m *Machine) {
		if running = m.running; !running {
			m.dropLinkLocked()
		}
	}); err != nil {
		return stats, err
	}
	if running {
		return stats, fault.New(fault.Precondition, "the machine is not paused")
	}
	m.host.mu.Lock()
	hook := m.host.save
	m.host.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, m); err != nil {
			return stats, err
		}
	}
	stats = vmm.Stats{Version: version, Machine: machineType, Accel: accel, CPU: cpu}
	begin := time.Now()
	if stats.StateBytes, err = m.writeState(to.State); err != nil {
		return stats, err
	}
	stats.StateTime = time.Since(begin)
	begin = time.Now()
	stats.MemoryBytes, err = m.ram.copyTo(ctx, to.Memory)
	stats.MemoryTime = time.Since(begin)
	if ended := m.ended(); ended != nil {
		return stats, ended
	}
	return stats, err
}

func (m *Machine) writeState(f *os.File) (int64, error) {
	b, err := json.Marshal(state{stateVersion, machineType, m.Spec.VCPUs, m.Spec.MemoryMB, stateMark})
	if err != nil {
		return 0, fmt.Errorf("write state: %w", err)
	}
	n, err := f.WriteAt(b, 0)
	if err != nil {
		return 0, fmt.Errorf("write state: %w", err)
	}
	return int64(n), nil
}

// checkState reads a state and compares it with a spec.
func checkState(f *os.File, spec vmm.Spec) error {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxState))
	if err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	if want := (state{stateVersion, machineType, spec.VCPUs, spec.MemoryMB, stateMark}); s != want {
		return fmt.Errorf("the state does not fit: it is of %+v, not %+v", s, want)
	}
	return nil
}

// Restore makes a machine of what was saved; see vmm.Snapshotter.
func (d *Driver) Restore(ctx context.Context, spec vmm.Spec, from vmm.Saved) (vmm.VM, error) {
	v, err := d.restore(ctx, spec, from)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", spec.ID, err)
	}
	return v, nil
}

func (d *Driver) restore(ctx context.Context, spec vmm.Spec, from vmm.Saved) (vmm.VM, error) {
	d.host.mu.Lock()
	hook := d.host.restore
	d.host.mu.Unlock()
	if err := d.prepare(ctx, spec, hook); err != nil {
		return nil, err
	}
	if from.State == nil || from.Memory == nil {
		return nil, fault.BadField("saved", "a state and a memory are needed")
	}
	if err := checkState(from.State, spec); err != nil {
		return nil, fault.As(fault.Precondition, err)
	}
	ram, err := openRAM(from.Memory, int64(spec.MemoryMB)<<20, from.Shared)
	if err != nil {
		return nil, fault.As(fault.Precondition, err)
	}
	v, err := d.start(spec, ram, false)
	if err != nil {
		ram.close()
		return nil, err
	}
	return v, nil
}

// hold waits for its turn to change the machine, or to keep others from it.
func (m *Machine) hold(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case m.still <- struct{}{}:
		return nil
	case <-m.done:
		return m.ended()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *Machine) release() { <-m.still }

// ended is the error of a machine that is gone, nil while it lives.
func (m *Machine) ended() error {
	select {
	case <-m.done:
		return fault.New(fault.Unavailable, "%w: %s", errGone, m.exit.Detail)
	default:
		return nil
	}
}

var errGone = errors.New("the machine is gone")
