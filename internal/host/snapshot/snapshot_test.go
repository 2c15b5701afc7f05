package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

func fits() Fits {
	return Fits{
		VMM: "qemu", VMMVersion: "7.2", Machine: "pc-q35-7.2", Accel: "tcg", CPU: "max", KernelID: "k1", VCPUs: 1, MemoryMB: 8,
	}
}

// content is size bytes with noise here and there, and zeros between.
func content(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, size)
	for at := 0; at < size; at += r.IntN(3 << 20) {
		for i := at; i < min(size, at+r.IntN(20_000)); i++ {
			b[i] = byte(r.Uint32())
		}
	}
	return b
}

// write publishes a snapshot of made-up parts at dir.
func write(t *testing.T, dir string) (*Snapshot, map[string][]byte) {
	t.Helper()
	d, err := Begin(dir)
	if err != nil {
		t.Fatal(err)
	}
	parts := map[string][]byte{stateFile: content(1, 400_001), memoryFile: content(2, 8<<20), dataFile: content(3, 5<<20+17)}
	if err := os.WriteFile(d.Data(), parts[dataFile], 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := d.Publish(testenv.Context(t), Manifest{ID: "sn-1", Kind: Named, Fits: fits(), DiskMB: 5, ImageDigest: "sha256:i"},
		fileOf(t, parts[stateFile]), fileOf(t, parts[memoryFile]))
	if err != nil {
		t.Fatal(err)
	}
	return s, parts
}

// fileOf returns a memory file that holds b.
func fileOf(t *testing.T, b []byte) *os.File {
	t.Helper()
	f, err := NewMemory("test", int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

func readAll(t *testing.T, f *os.File) []byte {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, info.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sn-1")
	written, parts := write(t, dir)
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(written, s); diff != "" {
		t.Error(diff)
	}
	ctx := testenv.Context(t)
	if err := s.Verify(ctx); err != nil {
		t.Error(err)
	}
	mem, err := s.LoadMemory(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	state, err := s.CopyState(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := s.CopyData(ctx, disk); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if again := copyInRAM(t, s); !bytes.Equal(again, data) {
		t.Error("the data disk came back altered by RAM")
	}
	for name, got := range map[string][]byte{memoryFile: readAll(t, mem), stateFile: readAll(t, state), dataFile: data} {
		if !bytes.Equal(got, parts[name]) {
			t.Errorf("%s came back altered", name)
		}
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("%d entries beside the snapshot", len(entries)-1)
	}
}

// TestAFlippedBitIsFound flips one bit of each part in turn, in data and in
// what was zero.
func TestAFlippedBitIsFound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sn-1")
	s, parts := write(t, dir)
	ctx := testenv.Context(t)
	for name, use := range map[string]func() error{
		stateFile: func() error { f, err := s.CopyState(ctx); closeAll(f); return err },
		memoryFile: func() error {
			f, err := s.LoadMemory(ctx)
			closeAll(f)
			return err
		},
		dataFile: func() error {
			f, err := s.LoadData(ctx)
			closeAll(f)
			if copied := s.CopyData(ctx, filepath.Join(t.TempDir(), "copy")); (copied == nil) != (err == nil) {
				t.Errorf("copied: %v, read into RAM: %v", copied, err)
			}
			return err
		},
	} {
		size := len(parts[name])
		for _, at := range []int{0, size / 2, size - 1} {
			flip(t, filepath.Join(dir, name), int64(at))
			for what, err := range map[string]error{"use": use(), "verify": s.Verify(ctx)} {
				if err == nil || !strings.Contains(err.Error(), "damaged") || !strings.Contains(err.Error(), name) {
					t.Errorf("%s at %d, %s: %v", name, at, what, err)
				}
			}
			flip(t, filepath.Join(dir, name), int64(at))
		}
		if err := use(); err != nil {
			t.Errorf("%s, mended: %v", name, err)
		}
	}
}

func closeAll(f *os.File) {
	if f != nil {
		f.Close()
	}
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func TestWhatDoesNotFitIsRefused(t *testing.T) {
	if err := fits().Check(fits()); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(*Fits){
		"VMM ":           func(f *Fits) { f.VMM = "other" },
		"VMM version":    func(f *Fits) { f.VMMVersion = "8" },
		"machine type":   func(f *Fits) { f.Machine = "m" },
		"accelerator":    func(f *Fits) { f.Accel = "kvm" },
		"CPU":            func(f *Fits) { f.CPU = "min" },
		"kernel pack":    func(f *Fits) { f.KernelID = "k2" },
		"number of vCPU": func(f *Fits) { f.VCPUs = 2 },
		"memory size":    func(f *Fits) { f.MemoryMB = 16 },
	} {
		here := fits()
		change(&here)
		if err := fits().Check(here); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestDamagedDirectoriesAreRefused(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, dir string){
		"no manifest": func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, manifestFile)) },
		"cut part":    func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, memoryFile), 4096) },
		"longer part": func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, dataFile), 50<<20) },
		"no part":     func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, stateFile)) },
		"link as part": func(t *testing.T, dir string) {
			os.Rename(filepath.Join(dir, stateFile), filepath.Join(dir, "x"))
			os.Symlink("x", filepath.Join(dir, stateFile))
		},
		"newer format":  func(t *testing.T, dir string) { edit(t, dir, func(m map[string]any) { m["version"] = 2 }) },
		"other memory":  func(t *testing.T, dir string) { edit(t, dir, func(m map[string]any) { delete(m, "memory") }) },
		"half manifest": func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, manifestFile), 100) },
	} {
		dir := filepath.Join(t.TempDir(), "sn-1")
		write(t, dir)
		damage(t, dir)
		if s, err := Open(dir); err == nil {
			t.Errorf("%s: opened %+v", name, s)
		}
	}
	if _, err := Open(t.TempDir()); !fault.Is(err, fault.NotFound) {
		t.Errorf("nothing there: %v", err)
	}
}

func edit(t *testing.T, dir string, change func(map[string]any)) {
	t.Helper()
	path := filepath.Join(dir, manifestFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	if b, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDraftsLeaveNothing drops one, breaks one, and begins one where a killed
// hutchd left another.
func TestDraftsLeaveNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sn-1")
	d, err := Begin(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(d.Dir); err == nil {
		t.Error("a draft was opened")
	}
	if err := d.Drop(); err != nil {
		t.Error(err)
	}
	if d, err = Begin(dir); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(testenv.Context(t))
	cancel()
	if _, err := d.Publish(ctx, Manifest{ID: "sn-1", Fits: fits()}, fileOf(t, []byte("x")), fileOf(t, make([]byte, 8<<20))); err == nil {
		t.Error("published on a dead context")
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
	if _, err = Begin(dir); err != nil { // and is killed
		t.Fatal(err)
	}
	write(t, dir)
}

func TestSealedMemoryStays(t *testing.T) {
	mem, err := NewMemory("test", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if _, err := mem.WriteAt([]byte("x"), 5); err != nil {
		t.Fatal(err)
	}
	if err := Seal(mem); err != nil {
		t.Fatal(err)
	}
	if _, err := mem.WriteAt([]byte("y"), 5); err == nil {
		t.Error("sealed memory was written")
	}
	if err := mem.Truncate(0); err == nil {
		t.Error("sealed memory was cut")
	}
}

func TestDigestKnowsNoHoles(t *testing.T) {
	dir := t.TempDir()
	b := content(9, 6<<20)
	dense, err := os.Create(filepath.Join(dir, "dense"))
	if err != nil {
		t.Fatal(err)
	}
	defer dense.Close()
	sparse, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer sparse.Close()
	if _, err := dense.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := sparse.Truncate(int64(len(b))); err != nil {
		t.Fatal(err)
	}
	ctx := testenv.Context(t)
	one, err := measure(ctx, dense, sparse, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	two, err := measure(ctx, sparse, nil, int64(len(b)))
	if err != nil || one != two {
		t.Errorf("%+v, %+v, %v", one, two, err)
	}
	empty, err := os.Create(filepath.Join(dir, "empty"))
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if none, err := measure(ctx, empty, nil, 0); err != nil || none.Stored != 0 || none.Digest == one.Digest {
		t.Errorf("%+v, %v", none, err)
	}
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	st, err := NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	id := NewID()
	write(t, filepath.Join(dir, id))
	damaged := NewID()
	write(t, filepath.Join(dir, damaged))
	if err := os.Truncate(filepath.Join(dir, damaged, memoryFile), 1); err != nil {
		t.Fatal(err)
	}
	all, bad := st.List()
	if len(all) != 1 || all[0].Dir != filepath.Join(dir, id) || bad == nil || !strings.Contains(bad.Error(), damaged) {
		t.Errorf("listed %v, %v", all, bad)
	}
	for _, unknown := range []string{"", "sn-", "sn-0", "../x", id + "/.."} {
		if _, err := st.Get(unknown); !fault.Is(err, fault.NotFound) {
			t.Errorf("%q: %v", unknown, err)
		}
	}
	for range 2 {
		if err := st.Remove(id); err != nil {
			t.Error(err)
		}
	}
	if _, err := st.Begin(NewID()); err != nil { // and is killed
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, goingPrefix+"sn-1"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := NewStore(dir); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 || entries[0].Name() != damaged {
		t.Errorf("left: %v", entries)
	}
}

// copyInRAM is what the data disk is after a way through RAM, where two copies
// are made of it at a time. It must keep its holes.
func copyInRAM(t *testing.T, s *Snapshot) []byte {
	t.Helper()
	ctx := testenv.Context(t)
	mem, err := s.LoadData(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := Seal(mem); err != nil {
		t.Fatal(err)
	}
	paths := []string{filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")}
	var wg sync.WaitGroup
	for _, p := range paths {
		wg.Go(func() {
			if err := CopyMemory(ctx, mem, p); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := CopyMemory(ctx, mem, paths[0]); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file that is there: %v", err)
	}
	a, errA := os.ReadFile(paths[0])
	b, errB := os.ReadFile(paths[1])
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("two copies differ: %v, %v", errA, errB)
	}
	var st unix.Stat_t
	if err := unix.Stat(paths[0], &st); err != nil || st.Blocks*512 >= st.Size {
		t.Errorf("%d blocks of a file of %d bytes, %v", st.Blocks, st.Size, err)
	}
	return a
}
