package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
)

// writeModule writes a minimal 64-bit ELF file with a .modinfo section that
// names the dependencies.
func writeModule(t *testing.T, dir, name, depends string) {
	t.Helper()
	info := []byte("license=GPL\x00depends=" + depends + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	const header, section = 64, 64
	var b bytes.Buffer
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) }
	put(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64),
		Version: 1, Shoff: uint64(header + len(info) + len(names)), Ehsize: header, Shentsize: section, Shnum: 3, Shstrndx: 2,
	})
	b.Write(info)
	b.Write(names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: header, Size: uint64(len(info))})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(header + len(info)), Size: uint64(len(names))})
	if err := os.WriteFile(filepath.Join(dir, name+".ko"), b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fakeSource makes a kernel and a modules directory in which every boot module
// depends on "virtio", and overlay is built in.
func fakeSource(t *testing.T) Source {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "6.1.0-test")
	kernelDir := filepath.Join(dir, "kernel/drivers")
	if err := os.MkdirAll(kernelDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range BootModules() {
		if name != "overlay" {
			writeModule(t, kernelDir, strings.ReplaceAll(name, "_", "-"), "virtio")
		}
	}
	writeModule(t, kernelDir, "virtio", "virtio-ring")
	writeModule(t, kernelDir, "virtio_ring", "")
	os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/overlayfs/overlay.ko\n"), 0o644)
	vmlinuz := filepath.Join(t.TempDir(), "vmlinuz")
	os.WriteFile(vmlinuz, []byte("a kernel"), 0o644)
	src, err := Files(vmlinuz, dir)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func writeAgent(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hutch-agent")
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadOrderPutsDependenciesFirst(t *testing.T) {
	tree, err := readModuleTree(fakeSource(t).Modules)
	if err != nil {
		t.Fatal(err)
	}
	order, err := tree.loadOrder(BootModules())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range order {
		names = append(names, moduleName(f))
	}
	if names[0] != "virtio_ring" || names[1] != "virtio" {
		t.Errorf("order %v does not start with the dependencies", names)
	}
	if slices.Contains(names, "overlay") {
		t.Errorf("order %v contains a built-in module", names)
	}
	if len(names) != len(BootModules())+1 {
		t.Errorf("order %v: want every module once", names)
	}
}

func TestMissingModuleIsNamed(t *testing.T) {
	tree, err := readModuleTree(fakeSource(t).Modules)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tree.loadOrder([]string{"no_such"}); err == nil || !strings.Contains(err.Error(), "no_such") {
		t.Errorf("error %v does not name the module", err)
	}
}

func TestBuildIsDeterministicAndRefreshFollowsTheAgent(t *testing.T) {
	src, ctx := fakeSource(t), context.Background()
	agent := writeAgent(t, "agent one")
	var packs []Pack
	var store *Store
	for range 2 {
		s, err := Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.Build(ctx, src, agent)
		if err != nil {
			t.Fatal(err)
		}
		packs, store = append(packs, p), s
	}
	if packs[0].ID != packs[1].ID {
		t.Errorf("same input, different ids: %s and %s", packs[0].ID, packs[1].ID)
	}
	if p, err := store.Build(ctx, src, agent); err != nil || p.ID != packs[1].ID {
		t.Errorf("building again: %v %v", p.ID, err)
	}
	same, err := store.Refresh(agent)
	if err != nil || same.ID != packs[1].ID {
		t.Errorf("refresh with the same agent: %v, %v", same.ID, err)
	}
	other, err := store.Refresh(writeAgent(t, "agent two"))
	if err != nil || other.ID == packs[1].ID {
		t.Fatalf("refresh with another agent: %v, %v", other.ID, err)
	}
	cur, err := store.Current()
	if err != nil || cur != other {
		t.Errorf("current is %+v (%v), want %+v", cur, err, other)
	}
	// Going back to the first agent must give the first pack again, from the
	// boot modules kept in the second.
	back, err := store.Refresh(agent)
	if err != nil || back.ID != packs[1].ID {
		t.Errorf("refresh back: %v, %v", back.ID, err)
	}
	if err := store.Reclaim(map[string]bool{}); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Get(other.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("unused pack after reclaim: %v", err)
	}
	if _, err := store.Get(back.ID); err != nil {
		t.Errorf("current pack after reclaim: %v", err)
	}
}

func TestCurrentWithoutPackSaysWhatToDo(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Current(); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "setup") {
		t.Errorf("got %v", err)
	}
}

func TestPackThatMissesAPartSaysWhatToDo(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Build(context.Background(), fakeSource(t), writeAgent(t, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(p.Kernel); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Current(); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "setup") {
		t.Errorf("got %v", err)
	}
}

func TestBuildLeavesNothingOnError(t *testing.T) {
	root := t.TempDir()
	s, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Build(context.Background(), fakeSource(t), "/no/such/agent"); err == nil {
		t.Fatal("build without an agent succeeded")
	}
	left, err := os.ReadDir(filepath.Join(root, "kernels"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// TestKernelsAreUnpacked packs a made-up kernel as bzImages do.
func TestKernelsAreUnpacked(t *testing.T) {
	kernel := append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel"), 1000)...)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write(kernel)
	z.Close()
	image := make([]byte, 1024+100)
	image[setupSectsOffset] = 1
	copy(image[headerMagicOffset:], "HdrS")
	binary.LittleEndian.PutUint32(image[payloadOffset:], 100)
	binary.LittleEndian.PutUint32(image[payloadLengthOffset:], uint32(packed.Len()+4))
	image = append(image, packed.Bytes()...)
	image = binary.LittleEndian.AppendUint32(image, uint32(len(kernel)))
	if got, err := unpackKernel(append(image, "tail"...)); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("unpacked %d bytes, %v", len(got), err)
	}
	for name, bad := range map[string][]byte{
		"empty": nil, "ELF": kernel, "cut off": image[:len(image)-10], "no magic": make([]byte, 4096),
		"no ELF": append(append([]byte{}, image[:1124]...), make([]byte, 100)...),
	} {
		if _, err := unpackKernel(bad); !errors.Is(err, errNotPacked) {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := bytes.Clone(image)
	broken[1124+30] ^= 0xff
	if got, err := unpackKernel(broken); err == nil && bytes.Equal(got, kernel) {
		t.Error("a broken payload was unpacked whole")
	}
}

func TestFilesRefusesWhatIsNoKernel(t *testing.T) {
	if _, err := Files("/no/vmlinuz", t.TempDir()); err == nil {
		t.Error("missing kernel accepted")
	}
	kernel := writeAgent(t, "k")
	if _, err := Files(kernel, t.TempDir()); err == nil || !strings.Contains(err.Error(), "/lib/modules") {
		t.Errorf("empty modules directory: %v", err)
	}
}
