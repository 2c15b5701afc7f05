package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/hutch-run/hutch/internal/host/vmm/qemu/ram"
)

// bareSaved is a bare machine that stood still: others are started from it.
type bareSaved struct {
	memory *os.File // just the memory, on disk or in RAM
	state  string   // path of what QEMU wrote of its devices
	data   string   // path of the data disk
}

// save stops the machine and writes it down: its devices into dir, its memory
// into an empty file. It stays stopped, its link closed.
func (b *bare) save(ctx context.Context, dir string, memory *os.File) (*bareSaved, error) {
	if err := b.link.Close(); err != nil {
		return nil, err
	}
	b.link = nil
	qmp, err := b.control(ctx)
	if err != nil {
		return nil, err
	}
	if err := qmp.do("stop", nil, nil); err != nil {
		return nil, err
	}
	if err := awaitHangUp(ctx, qmp); err != nil {
		return nil, err
	}
	s := &bareSaved{memory: memory, state: filepath.Join(dir, "state"), data: filepath.Join(b.dir, dataImage)}
	if err := qmp.do("xen-save-devices-state", map[string]any{"filename": s.state, "live": false}, nil); err != nil {
		return nil, err
	}
	from, err := ram.Open(b.cmd.Process.Pid, b.memory)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	if _, err := from.Copy(ctx, memory); err != nil {
		return nil, err
	}
	return s, nil
}

// awaitHangUp waits until QEMU has seen that nobody is on the link any more,
// which it tells the guest by writing to its memory. It takes a turn of its loop.
func awaitHangUp(ctx context.Context, qmp *monitor) error {
	for ctx.Err() == nil {
		var all []struct{ Label, Filename string }
		if err := qmp.do("query-chardev", nil, &all); err != nil {
			return err
		}
		for _, c := range all {
			if c.Label == "link" && strings.HasPrefix(c.Filename, "disconnected:") {
				return nil
			}
		}
	}
	return context.Cause(ctx)
}
