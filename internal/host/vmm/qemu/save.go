package qemu

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/ram"
	"github.com/hutch-run/hutch/internal/proc"
)

// Save saves the machine; see vmm.Saver.
func (v *vm) Save(ctx context.Context, to vmm.Files) (vmm.Stats, error) {
	stats, err := v.save(ctx, to)
	if err != nil {
		return stats, fmt.Errorf("save %s: %w", v.spec.ID, v.explain(ctx, err))
	}
	return stats, nil
}

func (v *vm) save(ctx context.Context, to vmm.Files) (vmm.Stats, error) {
	var stats vmm.Stats
	if len(v.spec.Shares) > 0 {
		return stats, fault.New(fault.Precondition, "QEMU can't write down a machine with shares: part of their state is not its own")
	}
	if err := v.hold(ctx); err != nil {
		return stats, err
	}
	defer v.release()
	c, err := v.client(ctx)
	if err != nil {
		return stats, err
	}
	if err := standing(ctx, c); err != nil {
		return stats, err
	}
	if err := v.cutLink(ctx, c); err != nil {
		return stats, err
	}
	header, err := v.describe(ctx, c)
	if err != nil {
		return stats, err
	}
	stats.Version, stats.Machine, stats.Accel, stats.CPU = header.Version, header.Machine, header.Accel, header.CPU
	begin := time.Now()
	devices, err := v.saveDevices(ctx, c)
	if err != nil {
		return stats, err
	}
	if stats.StateBytes, err = writeState(to.State, header, devices); err != nil {
		return stats, err
	}
	stats.StateTime = time.Since(begin)
	begin = time.Now()
	stats.MemoryBytes, err = v.saveMemory(ctx, int64(header.MemoryMB)<<20, to.Memory)
	stats.MemoryTime = time.Since(begin)
	return stats, err
}

// hold keeps the guest's memory as it is until release: nothing that changes it
// happens while somebody else holds it. It waits for its turn.
func (v *vm) hold(ctx context.Context) error {
	select {
	case v.still <- struct{}{}:
		return nil
	case <-v.done:
		return fault.New(fault.Unavailable, "the machine is gone")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (v *vm) release() { <-v.still }

// standing refuses a machine that is not paused.
func standing(ctx context.Context, c *qmp.Client) error {
	var status struct{ Status string }
	if err := c.Execute(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if status.Status != "paused" {
		return fault.New(fault.Precondition, "the machine is not paused: QEMU says %q", proc.Printable(status.Status))
	}
	return nil
}

// quietTurns is how many answers in a row must find the link closed. Each is a
// turn of QEMU's main loop, which sees in one turn that a connection was made,
// and in the next that it has ended: so none waits unseen.
const quietTurns = 4

// cutLink closes the link, and waits until QEMU has seen that and told the
// guest, which it does by writing to its memory.
func (v *vm) cutLink(ctx context.Context, c *qmp.Client) error {
	v.mu.Lock()
	if v.link != nil {
		v.link.Close()
		v.link = nil
	}
	v.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	for quiet := 0; quiet < quietTurns; quiet++ {
		var all []struct{ Label, Filename string }
		if err := c.Execute(ctx, "query-chardev", nil, &all); err != nil {
			return fmt.Errorf("close the link: %w", err)
		}
		for _, x := range all {
			if x.Label == linkChardev && !strings.HasPrefix(x.Filename, "disconnected:") {
				quiet = -1
			}
		}
	}
	return nil
}

// describe says what the machine is. It asks, because an adopted QEMU may be
// older than the driver's.
func (v *vm) describe(ctx context.Context, c *qmp.Client) (stateHeader, error) {
	p, err := askPlatform(ctx, c, v.accel)
	if err != nil {
		return stateHeader{}, err
	}
	var cpus []struct{}
	if err := c.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return stateHeader{}, err
	}
	var memory struct {
		Base int64 `json:"base-memory"`
	}
	if err := c.Execute(ctx, "query-memory-size-summary", nil, &memory); err != nil {
		return stateHeader{}, err
	}
	return stateHeader{platform: p, VCPUs: len(cpus), MemoryMB: int(memory.Base >> 20)}, nil
}

// saveDevices returns all that QEMU keeps of the machine but its memory. QEMU
// writes it into a file in RAM, on account of its own cgroup, and gets no file
// of a snapshot to write to.
func (v *vm) saveDevices(ctx context.Context, c *qmp.Client) ([]byte, error) {
	fd, err := unix.MemfdCreate("hutch-state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("save devices: %w", err)
	}
	f := os.NewFile(uintptr(fd), "hutch-state")
	defer f.Close()
	// QEMU takes only a file that can be written and not read.
	theirs, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("save devices: %w", err)
	}
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := c.Pass(ctx, theirs, "add-fd", nil, &set); err != nil {
		return nil, fmt.Errorf("save devices: %w", err)
	}
	v.mu.Lock()
	v.stale = append(v.stale, set.ID)
	v.mu.Unlock()
	// live=false: the disks stay this QEMU's, which goes on.
	arguments := map[string]any{"filename": fmt.Sprintf("/dev/fdset/%d", set.ID), "live": false}
	if err := c.Execute(ctx, saveCommand, arguments, nil); err != nil {
		return nil, fmt.Errorf("save devices: %w", err)
	}
	devices, err := io.ReadAll(io.NewSectionReader(f, 0, maxState))
	if err != nil {
		return nil, fmt.Errorf("save devices: %w", err)
	}
	if len(devices) == maxState {
		return nil, fmt.Errorf("save devices: QEMU wrote more than %d bytes", maxState)
	}
	// QEMU keeps the file until Resume.
	return devices, f.Truncate(0)
}

// dropStale takes back what saves left in QEMU, which it gives back only while
// the machine runs. It does so by itself when hutchd goes away.
func (v *vm) dropStale(ctx context.Context, c *qmp.Client) {
	v.mu.Lock()
	sets := v.stale
	v.stale = nil
	v.mu.Unlock()
	for _, id := range sets {
		if err := c.Execute(ctx, "remove-fd", map[string]any{"fdset-id": id}, nil); err != nil {
			v.driver.logger.Debug("a save left a file in QEMU", "sandbox_id", v.spec.ID, "error", err)
		}
	}
}

func (v *vm) saveMemory(ctx context.Context, size int64, to *os.File) (int64, error) {
	id := v.proc.ID()
	memory, err := ram.Open(id.PID, size)
	if err != nil {
		return 0, err
	}
	defer memory.Close()
	if now, err := proc.Identify(id.PID); err != nil || now != id {
		return 0, fault.New(fault.Unavailable, "the machine is gone")
	}
	return memory.Copy(ctx, to)
}
