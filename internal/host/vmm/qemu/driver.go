package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/host/vmm"
)

// DriverName is Caps.Name and sandbox.Machine.Driver.
const DriverName = "qemu"

// defaultBinary is looked for in PATH.
const defaultBinary = "qemu-system-x86_64"

// What a machine costs beyond its guest's memory, in MB: QEMU itself, its
// buffers, page cache for its disks, and the translated code when emulating.
const (
	tcgBufferMB    = 128
	kvmOverheadMB  = 160
	tcgOverheadMB  = kvmOverheadMB + tcgBufferMB
	ioThreads      = 64 // QEMU's own bound of its pool
	otherThreads   = 32
	openFilesLimit = 1024
)

// controlTime bounds waiting for a QEMU that has to answer at once.
const controlTime = 30 * time.Second

// Params makes a Driver.
type Params struct {
	Jail *jail.Jail
	// Binary is the path of QEMU; empty: it is looked for in PATH.
	Binary string
	// Accel is the accelerator to use; empty: Auto.
	Accel Accel
	// Hide lists directories that no QEMU may see, such as hutchd's own.
	Hide []string
	// LogMax is the size of each capped log, in bytes; 0: proc.DefaultLogMax.
	LogMax int64
	Logger *slog.Logger
}

// Driver is a vmm.Driver, and a vmm.Snapshotter.
type Driver struct {
	params Params
	caps   vmm.Caps
	logger *slog.Logger
}

var (
	_ vmm.Driver      = (*Driver)(nil)
	_ vmm.Snapshotter = (*Driver)(nil)
)

// New looks at QEMU and chooses the accelerator, which takes a moment where
// KVM has to prove itself. An unusable QEMU, or KVM when it was asked for, is a
// fault.Precondition that says what to do.
func New(ctx context.Context, p Params) (*Driver, error) {
	if p.Jail == nil {
		return nil, errors.New("drive QEMU: a jail is needed")
	}
	if p.Logger == nil {
		p.Logger = slog.New(slog.DiscardHandler)
	}
	name := p.Binary
	if name == "" {
		name = defaultBinary
	}
	binary, err := exec.LookPath(name)
	if err != nil {
		return nil, fault.New(fault.Precondition, "find QEMU: %w (on Debian: apt install qemu-system-x86)", err)
	}
	p.Binary = binary
	version, err := askVersion(ctx, binary)
	if err != nil {
		return nil, err
	}
	accel, reason, err := choose(p.Accel, func() error { return kvmProblem(ctx, p.Jail, binary) })
	if err != nil {
		return nil, err
	}
	guests, saves, err := probe(ctx, p.Jail, binary, accel)
	if err != nil {
		return nil, err
	}
	overhead := kvmOverheadMB
	if accel == TCG {
		overhead = tcgOverheadMB
	}
	return &Driver{params: p, logger: p.Logger, caps: vmm.Caps{
		Name: DriverName, Version: version, Accel: string(accel), AccelReason: reason,
		MaxVCPUs: vmm.MaxVCPUs, MemoryOverheadMB: overhead,
		Snapshots: saves, Machine: guests.Machine, CPU: guests.CPU,
	}}, nil
}

// Caps tells what was found by New.
func (d *Driver) Caps() vmm.Caps { return d.caps }

// askVersion asks QEMU for its version, and refuses one that is too old.
func askVersion(ctx context.Context, binary string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, controlTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Env = []string{}
	out, err := cmd.Output()
	if err != nil {
		return "", fault.New(fault.Precondition, "ask QEMU for its version: %w", err)
	}
	return parseVersion(string(out))
}

// The oldest QEMU that is tested.
const minMajor, minMinor = 7, 2

func parseVersion(out string) (string, error) {
	first, _, _ := strings.Cut(out, "\n")
	m := regexp.MustCompile(`^QEMU emulator version ((\d{1,4})\.(\d{1,4})[\w.~+-]{0,40})`).FindStringSubmatch(first)
	if m == nil {
		return "", fault.New(fault.Precondition, "ask QEMU for its version: it said %.80q", first)
	}
	major, errMajor := strconv.Atoi(m[2])
	minor, errMinor := strconv.Atoi(m[3])
	if err := errors.Join(errMajor, errMinor); err != nil {
		return "", fmt.Errorf("read QEMU's version: %w", err)
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return "", fault.New(fault.Precondition, "QEMU %s is too old: %d.%d or newer is needed", m[1], minMajor, minMinor)
	}
	return m[1], nil
}
