package ram_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/ram"
	"github.com/hutch-run/hutch/internal/testenv"
)

const (
	size = 8 << 20
	page = 4096
	uid  = 64997
)

func newMemory(t *testing.T) *os.File {
	t.Helper()
	f, err := ram.New(size, uid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func mapIt(t *testing.T, f *os.File, flags int) []byte {
	t.Helper()
	b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

func put(t *testing.T, f *os.File, b byte, pages ...int64) {
	t.Helper()
	for _, p := range pages {
		if _, err := f.WriteAt(bytes.Repeat([]byte{b}, page), p*page); err != nil {
			t.Fatal(err)
		}
	}
}

// copyOf returns what is in this process's one mapping of memory, and which
// pages of that are stored.
func copyOf(t *testing.T) (got []byte, stored []int64) {
	t.Helper()
	m, err := ram.Open(os.Getpid(), size)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	fd, err := unix.MemfdCreate("copy", unix.MFD_CLOEXEC) // has holes of pages
	if err != nil {
		t.Fatal(err)
	}
	dst := os.NewFile(uintptr(fd), "copy")
	defer dst.Close()
	n, err := m.Copy(t.Context(), dst)
	if err != nil {
		t.Fatal(err)
	}
	for at := int64(0); at < size; at += page {
		if data, err := unix.Seek(fd, at, unix.SEEK_DATA); err == nil && data == at {
			stored = append(stored, at/page)
		}
	}
	if n != int64(len(stored))*page {
		t.Errorf("%d bytes are told, %d pages stored", n, len(stored))
	}
	got = make([]byte, size)
	if _, err := dst.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	return got, stored
}

func stored(f *os.File) int64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return -1
	}
	return st.Blocks * 512
}

func TestShared(t *testing.T) {
	testenv.RequireRoot(t)
	f := newMemory(t)
	b := mapIt(t, f, unix.MAP_SHARED)
	b[0], b[300*page+5], b[size-1] = 1, 2, 3
	b[7*page] = 0 // there, and zero
	b[9*page] = 9
	b[9*page] = 0
	before := stored(f)
	got, pages := copyOf(t)
	if stored(f) != before {
		t.Errorf("the copy filled the memory: %d bytes, %d before", stored(f), before)
	}
	if !bytes.Equal(got, b) || len(pages) != 3 {
		t.Errorf("the copy differs, or has too much: %v", pages)
	}
}

// TestPrivate copies a template with pages written over it: in place of data,
// in place of a hole, and to zero.
func TestPrivate(t *testing.T) {
	testenv.RequireRoot(t)
	f := newMemory(t)
	put(t, f, 7, 0, 1, 2, 256, 700)
	seal(t, f)
	if err := f.Chmod(0o666); err != nil {
		t.Fatal(err)
	}
	if err := ram.CheckTemplate(f, size); err != nil {
		t.Fatal(err)
	}
	b := mapIt(t, f, unix.MAP_PRIVATE)
	want := make([]byte, size)
	if _, err := f.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	write := func(at int, v byte) { b[at], want[at] = v, v }
	write(page+3, 1)      // over data
	write(100*page, 2)    // over a hole
	write(size-1, 3)      // the last byte
	for i := range page { // data that becomes zero
		write(2*page+i, 0)
	}
	_ = b[700*page] // a page of the template that is only read
	before := stored(f)
	got, pages := copyOf(t)
	if !bytes.Equal(got, want) {
		t.Error("the copy differs")
	}
	if len(pages) != 6 {
		t.Errorf("stored pages: %v", pages)
	}
	if stored(f) != before {
		t.Errorf("the copy filled the template: %d bytes, %d before", stored(f), before)
	}
	// In pieces, as a VMM that asks the kernel for something of a part has it.
	if err := unix.Mprotect(b[8*page:16*page], unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	if again, _ := copyOf(t); !bytes.Equal(again, want) {
		t.Error("the copy of a mapping in pieces differs")
	}
}

func seal(t *testing.T, f *os.File) {
	t.Helper()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
		t.Fatal(err)
	}
}

func TestNotFound(t *testing.T) {
	testenv.RequireRoot(t)
	refused := func(what string, pid int, want string) {
		t.Helper()
		m, err := ram.Open(pid, size)
		if err == nil {
			m.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	refused("no mapping", os.Getpid(), "no memory file")
	// One whose size could change under the reader.
	fd, err := unix.MemfdCreate("loose", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	loose := os.NewFile(uintptr(fd), "loose")
	defer loose.Close()
	if err := loose.Truncate(size); err != nil {
		t.Fatal(err)
	}
	mapIt(t, loose, unix.MAP_SHARED)
	refused("a file that is not sealed", os.Getpid(), "no memory file")
	a := newMemory(t)
	half, err := unix.Mmap(int(a.Fd()), 0, size/2, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	refused("half a file", os.Getpid(), "no memory file")
	unix.Munmap(half)
	mapIt(t, a, unix.MAP_SHARED)
	mapIt(t, newMemory(t), unix.MAP_SHARED)
	refused("two files", os.Getpid(), "two that could be it")

	child := exec.CommandContext(testenv.Context(t), "true")
	if err := child.Run(); err != nil {
		t.Fatal(err)
	}
	if m, err := ram.Open(child.Process.Pid, size); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a process that is gone: %v", err)
		if err == nil {
			m.Close()
		}
	}
}

func TestCopyEnds(t *testing.T) {
	testenv.RequireRoot(t)
	b := mapIt(t, newMemory(t), unix.MAP_SHARED)
	b[0], b[size-1] = 1, 1
	m, err := ram.Open(os.Getpid(), size)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dst, err := os.Create(t.TempDir() + "/memory")
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if _, err := m.Copy(ctx, dst); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	full, err := os.Create(testenv.SmallDisk(t, "4k") + "/memory")
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if _, err := m.Copy(t.Context(), full); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a full disk: %v", err)
	}
}

func TestRights(t *testing.T) {
	testenv.RequireRoot(t)
	f := newMemory(t)
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); fi.Mode().Perm() != 0o600 || st.Uid != uid {
		t.Errorf("memory has mode %v, owner %d", fi.Mode(), st.Uid)
	}
	for name, change := range map[string]int64{"grow": size + 1, "shrink": size - 1} {
		if err := f.Truncate(change); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := ram.CheckTemplate(f, size); err == nil {
		t.Error("memory that can be written is no template")
	}
	if err := ram.Own(f, size, uid+1); err != nil { // again, by another
		t.Error(err)
	}
	if err := ram.Own(f, size+1, uid); err == nil {
		t.Error("memory of another size was taken over")
	}
	seal(t, f)
	if err := ram.Own(f, size, uid); err == nil {
		t.Error("sealed memory was taken over")
	}
	if err := ram.CheckTemplate(f, size); err == nil || !strings.Contains(err.Error(), "0600") {
		t.Errorf("a template that VMMs cannot open: %v", err)
	}
	if _, err := f.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to a template: %v", err)
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
		t.Errorf("map a template to write: %v", err)
	}
}
