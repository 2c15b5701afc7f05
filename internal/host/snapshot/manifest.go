package snapshot

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Version is the version of the format that this build writes. Others are
// refused.
const Version = 1

// Kind is what a snapshot is for.
type Kind string

// The kinds.
const (
	Warm        Kind = "warm"        // made by itself from a template, for fast creates
	Named       Kind = "named"       // asked for by a caller; a template of its own
	Hibernation Kind = "hibernation" // a sandbox that sleeps
)

// Ready is what was up in the machine of a warm snapshot, beside its agent.
type Ready string

// What can be. The zero value is nothing.
const (
	ReadyDocker     Ready = "docker"
	ReadyKubernetes Ready = "kubernetes"
)

// Manifest says what a snapshot is and what it fits. It never changes.
type Manifest struct {
	Version   int       `json:"version"`
	ID        string    `json:"id"`
	Kind      Kind      `json:"kind"`
	CreatedAt time.Time `json:"created_at"`
	// Name is that of a named snapshot, and no template's.
	Name string `json:"name,omitempty"`
	// Ready is set for warm ones only.
	Ready Ready `json:"ready,omitempty"`

	Fits Fits `json:"fits"`

	DiskMB      int    `json:"disk_mb"`
	ImageDigest string `json:"image_digest"`
	// Template is the name of the template that it came from; Source the
	// sandbox that it was taken of, Parent the snapshot that one was made from.
	Template string     `json:"template,omitempty"`
	Source   sandbox.ID `json:"source,omitempty"`
	Parent   string     `json:"parent,omitempty"`
	// Defaults of commands.
	Env  map[string]string `json:"env,omitempty"`
	User string            `json:"user,omitempty"`
	Cwd  string            `json:"cwd,omitempty"`

	State  Part  `json:"state"`
	Memory Part  `json:"memory"`
	Data   *Part `json:"data,omitempty"`
}

// Fits is what a host must be to run a snapshot: everything that a guest saw
// of its machine.
type Fits struct {
	VMM        string `json:"vmm"`
	VMMVersion string `json:"vmm_version"`
	Machine    string `json:"machine"` // machine type, with its version
	Accel      string `json:"accel"`
	CPU        string `json:"cpu"` // model and flags
	KernelID   string `json:"kernel_id"`
	VCPUs      int    `json:"vcpus"`
	MemoryMB   int    `json:"memory_mb"`
}

// Part is one file of a snapshot.
type Part struct {
	Size   int64  `json:"size"` // bytes
	Digest string `json:"digest"`
	// Stored is how many bytes are not zero, in whole chunks.
	Stored int64 `json:"stored"`
}

// Stored is how many bytes all parts have that are not zero, in whole chunks.
func (m Manifest) Stored() int64 {
	n := m.State.Stored + m.Memory.Stored
	if m.Data != nil {
		n += m.Data.Stored
	}
	return n
}

// Check says why a snapshot that fits f can't run on a host that is now;
// fault.Precondition. Nil: it can.
func (f Fits) Check(now Fits) error {
	for _, c := range []struct{ what, taken, here string }{
		{"VMM", f.VMM, now.VMM},
		{"VMM version", f.VMMVersion, now.VMMVersion},
		{"machine type", f.Machine, now.Machine},
		{"accelerator", f.Accel, now.Accel},
		{"CPU", f.CPU, now.CPU},
		{"kernel pack", f.KernelID, now.KernelID},
		{"number of vCPUs", fmt.Sprint(f.VCPUs), fmt.Sprint(now.VCPUs)},
		{"memory size", fmt.Sprint(f.MemoryMB), fmt.Sprint(now.MemoryMB)},
	} {
		if c.taken != c.here {
			return fault.New(fault.Precondition, "the snapshot does not fit: its %s is %q, here it is %q", c.what, c.taken, c.here)
		}
	}
	return nil
}

// parse reads a manifest and checks it against itself.
func parse(b []byte) (Manifest, error) {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return Manifest{}, fmt.Errorf("read manifest: %w", err)
	}
	if v.Version != Version {
		return Manifest{}, fault.New(fault.Precondition, "the snapshot has format %d, this hutchd knows %d", v.Version, Version)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return Manifest{}, fmt.Errorf("read manifest: %w", err)
	}
	switch {
	case m.ID == "" || m.Fits.VMM == "" || m.Fits.MemoryMB <= 0 || m.Fits.VCPUs <= 0:
		return Manifest{}, fmt.Errorf("read manifest: it does not say what the snapshot is")
	case m.Memory.Size != int64(m.Fits.MemoryMB)<<20:
		return Manifest{}, fmt.Errorf("read manifest: memory has %d bytes and %d MiB", m.Memory.Size, m.Fits.MemoryMB)
	}
	return m, nil
}
