package vmmtest

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/vmm"
)

// saved is what a Save wrote. Its files go with the test.
type saved struct {
	spec          vmm.Spec
	state, memory *os.File
}

func newFile(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// save saves v, which is paused, and looks at what it tells.
func (s suite) save(t *testing.T, ctx context.Context, v vmm.VM, spec vmm.Spec) saved {
	t.Helper()
	to := saved{spec, newFile(t, "state"), newFile(t, "memory")}
	stats, err := v.(vmm.Saver).Save(ctx, vmm.Files{State: to.state, Memory: to.memory})
	if err != nil {
		t.Fatal(err)
	}
	size := func(f *os.File) (length, stored int64) {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Size, st.Blocks * 512
	}
	if length, _ := size(to.state); length == 0 || length != stats.StateBytes {
		t.Errorf("state has %d bytes, told are %d", length, stats.StateBytes)
	}
	length, stored := size(to.memory)
	if length != int64(spec.MemoryMB)<<20 || stats.MemoryBytes == 0 || stored > stats.MemoryBytes+1<<20 {
		t.Errorf("memory has %d bytes, %d of them stored, told are %d", length, stored, stats.MemoryBytes)
	}
	caps := s.Driver(t).Caps()
	if stats.Machine != caps.Machine || stats.Accel != caps.Accel || stats.CPU != caps.CPU {
		t.Errorf("saved on %+v, the driver says %+v", stats, caps)
	}
	running(t, ctx, v, false)
	t.Logf("saved: %d bytes of state in %v, %d MB of memory in %v", stats.StateBytes, stats.StateTime, stats.MemoryBytes>>20, stats.MemoryTime)
	return to
}

// load returns a memory file with the memory, sealed for copies or left to be
// somebody's own.
func (f saved) load(t *testing.T, seal bool) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("hutch-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	m := os.NewFile(uintptr(fd), "memory")
	t.Cleanup(func() { m.Close() })
	st, err := f.memory.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Chmod(0o666), m.Truncate(st.Size()), copyData(m, f.memory, st.Size())); err != nil {
		t.Fatal(err)
	}
	if seal {
		if _, err := unix.FcntlInt(m.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// copyData copies what is not a hole.
func copyData(dst, src *os.File, size int64) error {
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, data), io.NewSectionReader(src, data, end-data)); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func digest(t *testing.T, f *os.File) string {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, st.Size())); err != nil {
		t.Fatal(err)
	}
	return string(h.Sum(nil))
}

// copyOf returns a spec of a machine like the saved one with disks of its own.
func (s suite) copyOf(t *testing.T, from vmm.Spec) vmm.Spec {
	t.Helper()
	spec := s.Spec(t)
	t.Cleanup(func() { s.nothingLeft(t, spec) })
	spec.VCPUs, spec.MemoryMB = from.VCPUs, from.MemoryMB
	for _, d := range from.Disks {
		if !d.ReadOnly {
			b, err := os.ReadFile(d.Path)
			if err != nil {
				t.Fatal(err)
			}
			d.Path = filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(d.Path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		spec.Disks = append(spec.Disks, d)
	}
	return spec
}

func shortMemory(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("short", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "short")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	return f
}
