package qemu

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm"
)

// A saved state is a line that says what it is, the length of its header (4
// bytes, big-endian), the header as JSON, and what QEMU wrote. Version 1 was of
// machines whose cards had a guest announce itself, which those of now do not.
const stateMagic = "hutch-qemu-state 2\n"

// Bounds of a state, in bytes. QEMU's part of a machine with 64 vCPUs and 16
// disks has less than one megabyte.
const (
	maxStateHeader = 64 << 10
	maxState       = 64 << 20
)

// stateHeader says what a machine must be to load what follows. QEMU itself
// compares little: it would give a guest other memory than it had.
type stateHeader struct {
	platform
	VCPUs    int    `json:"vcpus"`
	MemoryMB int    `json:"memory_mb"`
	Length   int    `json:"length"` // of what follows
	SHA256   string `json:"sha256"` // of what follows, in hex
}

// writeState writes a state into an empty file, and returns its length.
func writeState(f *os.File, h stateHeader, devices []byte) (int64, error) {
	sum := sha256.Sum256(devices)
	h.Length, h.SHA256 = len(devices), hex.EncodeToString(sum[:])
	header, err := json.Marshal(h)
	if err != nil {
		return 0, fmt.Errorf("write state: %w", err)
	}
	var all bytes.Buffer
	all.WriteString(stateMagic)
	all.Write(binary.BigEndian.AppendUint32(nil, uint32(len(header))))
	all.Write(header)
	all.Write(devices)
	if _, err := f.WriteAt(all.Bytes(), 0); err != nil {
		return 0, fmt.Errorf("write state: %w", err)
	}
	return int64(all.Len()), nil
}

// readState reads a state and checks that it is whole. It leaves the file's
// offset alone: others may read it too.
func readState(f *os.File) (stateHeader, []byte, error) {
	var h stateHeader
	all, err := io.ReadAll(io.NewSectionReader(f, 0, maxState+1))
	if err != nil {
		return h, nil, fmt.Errorf("read state: %w", err)
	}
	rest, ok := bytes.CutPrefix(all, []byte(stateMagic))
	switch {
	case len(all) > maxState:
		return h, nil, fmt.Errorf("read state: it has more than %d bytes", maxState)
	case !ok:
		return h, nil, errors.New("read state: it is none of QEMU's that this version reads")
	case len(rest) < 4:
		return h, nil, errors.New("read state: it ends early")
	}
	n := int(binary.BigEndian.Uint32(rest))
	if rest = rest[4:]; n > min(maxStateHeader, len(rest)) {
		return h, nil, errors.New("read state: it ends early")
	}
	if err := json.Unmarshal(rest[:n], &h); err != nil {
		return h, nil, fmt.Errorf("read state: %w", err)
	}
	devices := rest[n:]
	if len(devices) != h.Length {
		return h, nil, fmt.Errorf("read state: %d bytes of devices, there were %d", len(devices), h.Length)
	}
	if sum := sha256.Sum256(devices); hex.EncodeToString(sum[:]) != h.SHA256 {
		return h, nil, errors.New("read state: its bytes are not what was written")
	}
	return h, devices, nil
}

// fits says why a state cannot be loaded into the machine of spec here.
func (h stateHeader) fits(spec vmm.Spec, here vmm.Caps) error {
	for _, c := range []struct{ what, saved, now string }{
		{"machine type", h.Machine, here.Machine},
		{"accelerator", h.Accel, here.Accel},
		{"number of vcpus", fmt.Sprint(h.VCPUs), fmt.Sprint(spec.VCPUs)},
		{"memory in MB", fmt.Sprint(h.MemoryMB), fmt.Sprint(spec.MemoryMB)},
	} {
		if c.saved != c.now {
			return fault.New(fault.Precondition, "the state does not fit: its %s is %s, here it is %s", c.what, c.saved, c.now)
		}
	}
	if h.CPU != here.CPU {
		return fault.New(fault.Precondition, "the state does not fit: its processor has %q that this one has not, and not %q",
			missing(h.CPU, here.CPU), missing(here.CPU, h.CPU))
	}
	return nil
}

// missing returns the words of a that b has not.
func missing(a, b string) []string {
	have := strings.Fields(b)
	return slices.DeleteFunc(strings.Fields(a), func(w string) bool { return slices.Contains(have, w) })
}

// sealedFile returns a file in RAM with just these bytes that nobody can
// change: what a state is passed to QEMU in.
func sealedFile(name string, bytes []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("pass %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(bytes)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pass %s: %w", name, err), f.Close())
	}
	return f, nil
}
