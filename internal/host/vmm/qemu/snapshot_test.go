package qemu_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/host/vmm"
	"github.com/hutch-run/hutch/internal/host/vmm/vmmtest"
	"github.com/hutch-run/hutch/internal/testenv"
)

// saveGuest boots a machine, saves it when its guest answers, and ends it.
func (b *bench) saveGuest(t testing.TB, spec vmm.Spec) (vmm.Saved, vmm.Stats) {
	t.Helper()
	ctx := testenv.Context(t)
	v, err := b.driver.Launch(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	answer(t, ctx, v, "echo up")
	if err := v.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	return saveVM(t, ctx, v, spec)
}

// saveVM saves a paused machine into files in RAM, its memory as a template's.
func saveVM(t testing.TB, ctx context.Context, v vmm.VM, spec vmm.Spec) (vmm.Saved, vmm.Stats) {
	t.Helper()
	to := vmm.Saved{State: memoryFile(t), Memory: memoryFile(t)}
	stats, err := v.(vmm.Saver).Save(ctx, vmm.Files{State: to.State, Memory: to.Memory})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(to.Memory.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK); err != nil {
		t.Fatal(err)
	}
	return to, stats
}

func memoryFile(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "test")
	t.Cleanup(func() { f.Close() })
	if err := f.Chmod(0o666); err != nil {
		t.Fatal(err)
	}
	return f
}

func answer(t testing.TB, ctx context.Context, v vmm.VM, request string) string {
	t.Helper()
	g, err := vmmtest.DialGuest(ctx, v)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	text, err := g.Ask(ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// forge changes QEMU's part of a state and makes the header fit it.
func forge(t *testing.T, state *os.File, change func([]byte) []byte) *os.File {
	t.Helper()
	all, err := io.ReadAll(io.NewSectionReader(state, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	magic, rest, _ := bytes.Cut(all, []byte("\n"))
	n := binary.BigEndian.Uint32(rest)
	var header map[string]any
	if err := json.Unmarshal(rest[4:4+n], &header); err != nil {
		t.Fatal(err)
	}
	devices := change(bytes.Clone(rest[4+n:]))
	sum := sha256.Sum256(devices)
	header["length"], header["sha256"] = len(devices), hex.EncodeToString(sum[:])
	text, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	forged := memoryFile(t)
	for _, b := range [][]byte{magic, []byte("\n"), binary.BigEndian.AppendUint32(nil, uint32(len(text))), text, devices} {
		if _, err := forged.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	return forged
}

// TestStateThatQEMURefuses gives QEMU states that are whole by their headers
// and are not: its own words must be in the error, and nothing be left.
func TestStateThatQEMURefuses(t *testing.T) {
	b := newBench(t)
	testenv.CheckGoroutines(t)
	ctx := testenv.Context(t)
	good := b.spec(t)
	good.Disks = []vmm.Disk{newDisk(t, "data")}
	from, _ := b.saveGuest(t, good)
	for name, change := range map[string]func(*vmm.Spec, *vmm.Saved){
		"nothing": func(_ *vmm.Spec, f *vmm.Saved) { f.State = forge(t, f.State, func([]byte) []byte { return nil }) },
		"half": func(_ *vmm.Spec, f *vmm.Saved) {
			f.State = forge(t, f.State, func(b []byte) []byte { return b[:len(b)/2] })
		},
		"no end": func(_ *vmm.Spec, f *vmm.Saved) {
			f.State = forge(t, f.State, func(b []byte) []byte { return b[:len(b)-1] })
		},
		"garbage": func(_ *vmm.Spec, f *vmm.Saved) {
			f.State = forge(t, f.State, func(b []byte) []byte { return bytes.Repeat([]byte{0xa5}, len(b)) })
		},
		"a disk less": func(s *vmm.Spec, _ *vmm.Saved) { s.Disks = nil },
	} {
		spec, f := good, from
		change(&spec, &f)
		v, err := b.driver.Restore(ctx, spec, f)
		if err == nil {
			end(t, v)
		}
		if err == nil || !strings.Contains(err.Error(), "QEMU exited 1: ") {
			t.Errorf("%s: %v, want QEMU's own words", name, err)
		}
		t.Logf("%s: %v", name, err)
		if l := b.left(t, spec); l != nil {
			t.Errorf("%s: left: %v", name, l)
		}
		if files, err := os.ReadDir(spec.Dir); err != nil || len(files) > 0 {
			t.Errorf("%s: left: %v, %v", name, files, err)
		}
	}
}

func newDisk(t *testing.T, serial string) vmm.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), serial)
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return vmm.Disk{Serial: serial, Path: path}
}

// TestRestoreDiskInUse restores a copy on the disk of a machine that runs: it
// never gets to run.
func TestRestoreDiskInUse(t *testing.T) {
	b := newBench(t)
	ctx := testenv.Context(t)
	spec := b.spec(t)
	spec.Disks = []vmm.Disk{newDisk(t, "data")}
	v, err := b.driver.Launch(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	answer(t, ctx, v, "echo up")
	if err := v.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	from, _ := saveVM(t, ctx, v, spec)
	other := b.spec(t)
	other.Disks = spec.Disks
	w, err := b.driver.Restore(ctx, other, from)
	if err == nil {
		defer end(t, w)
		err = w.Resume(ctx)
	}
	if err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("a second machine on a disk: %v", err)
	}
	t.Log(err)
	if err := v.Resume(ctx); err != nil {
		t.Error(err)
	}
	if got := answer(t, ctx, v, "query disks"); !strings.HasPrefix(got, "data=") {
		t.Errorf("the first machine: %s", got)
	}
}

// TestMemoryIsTheVMMsAlone looks at who could open a guest's memory.
func TestMemoryIsTheVMMsAlone(t *testing.T) {
	b := newBench(t)
	spec := b.spec(t)
	v, err := b.driver.Launch(testenv.Context(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	if own := memoryFiles(t, os.Getpid()); len(own) > 0 {
		t.Errorf("hutchd holds %v", own)
	}
	files := memoryFiles(t, v.Machine().Process.PID)
	if len(files) == 0 {
		t.Error("QEMU holds no memory file")
	}
	for path := range files {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode&0o777 != 0o600 || st.Uid != testUID || st.Size != int64(spec.MemoryMB)<<20 {
			t.Errorf("memory: mode %#o, owner %d, %d bytes", st.Mode, st.Uid, st.Size)
		}
	}
}

func memoryFiles(t testing.TB, pid int) map[string]string {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, l := range links {
		if name, err := os.Readlink(l); err == nil && strings.HasPrefix(name, "/memfd:") {
			found[l] = name
		}
	}
	return found
}

// TestSavesLeaveNothing saves a machine many times: what each leaves in QEMU
// goes with the next Resume.
func TestSavesLeaveNothing(t *testing.T) {
	b := newBench(t)
	ctx := testenv.Context(t)
	spec := b.spec(t)
	v, err := b.driver.Launch(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, v)
	answer(t, ctx, v, "echo up")
	before := len(memoryFiles(t, v.Machine().Process.PID))
	for range 3 {
		if err := v.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			to := vmm.Files{State: memoryFile(t), Memory: memoryFile(t)}
			_, err := v.(vmm.Saver).Save(ctx, to)
			if err = errors.Join(err, to.State.Close(), to.Memory.Close()); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if now := memoryFiles(t, v.Machine().Process.PID); len(now) != before {
			t.Errorf("QEMU holds %v, %d were before", now, before)
		}
	}
	answer(t, ctx, v, "echo still here")
}
