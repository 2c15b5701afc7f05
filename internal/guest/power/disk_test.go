package power

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// below is the kernel of this machine, narrowed to what is mounted below a
// directory and kept from everything that concerns more than that.
type below struct {
	Kernel
	t   *testing.T
	dir string
	off int
}

func (b *below) Own() error     { return nil }
func (b *below) KillAll() error { return nil }
func (b *below) Sync()          {}

func (b *below) EmergencyReadOnly() error {
	b.t.Error("emergency remount of the test's machine")
	return nil
}

func (b *below) Off() error {
	b.off++
	return nil
}

func (b *below) Mounts() ([]Mount, error) {
	all, err := b.Kernel.Mounts()
	var own []Mount
	for _, m := range all {
		if strings.HasPrefix(m.Point, b.dir+"/") {
			own = append(own, m)
		}
	}
	return own, err
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(testenv.Context(t), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// disk makes an ext4 filesystem of 64 MiB in dir/disk.img and mounts it at
// dir/data by a loop device.
func disk(t *testing.T) (dir, image, data string) {
	t.Helper()
	testenv.RequireRoot(t)
	dir = t.TempDir()
	testenv.CheckHost(t, testenv.Scope{Mounts: []string{dir}, LoopFiles: dir})
	image, data = filepath.Join(dir, "disk.img"), filepath.Join(dir, "data")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", image)
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-o", "loop", image, data)
	t.Cleanup(func() {
		for _, point := range []string{"merged", "bound", "data"} {
			_ = unix.Unmount(filepath.Join(dir, point), unix.MNT_DETACH) // most are gone by then
		}
	})
	return dir, image, data
}

func bind(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("bind %s: %v", to, err)
	}
}

func newBelow(t *testing.T, dir string) (*below, *Power) {
	k := &below{Kernel: System(false), t: t, dir: dir}
	return k, New(Params{Stopper: &stopper{j: &journal{}}, Kernel: k, Log: quiet})
}

// TestShutdownLeavesACleanDisk stacks mounts as a guest does: a bind mount and
// an overlay that stand on the data disk, the overlay still in use.
func TestShutdownLeavesACleanDisk(t *testing.T) {
	dir, image, data := disk(t)
	for _, d := range []string{"lower", "data/upper", "data/work", "data/bind", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bind(t, data+"/bind", dir+"/bound")
	layers := fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", dir, data, data)
	if err := unix.Mount("overlay", dir+"/merged", "overlay", 0, layers); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	for _, f := range []string{"merged/one", "bound/two"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	inUse, err := os.Open(filepath.Join(dir, "merged/one"))
	if err != nil {
		t.Fatal(err)
	}
	defer inUse.Close()

	k, p := newBelow(t, dir)
	p.Shutdown(time.Second)
	if err := p.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k.off != 1 {
		t.Errorf("powered off %d times", k.off)
	}
	left, err := k.Mounts()
	if err != nil || len(left) != 1 || left[0].Point != dir+"/merged" || !left[0].ReadOnly {
		t.Errorf("mounts left = %+v, %v; want the overlay alone, read-only", left, err)
	}
	// The superblock, as the next boot of the image will find it.
	head := run(t, "dumpe2fs", "-h", image)
	if !strings.Contains(head, "Filesystem state:         clean") || strings.Contains(head, "needs_recovery") {
		t.Errorf("the disk is not clean:\n%s", head)
	}
	for path, want := range map[string]string{"/upper/one": "content", "/bind/two": "content"} {
		if got := run(t, "debugfs", "-R", "cat "+path, image); !strings.HasSuffix(got, want) {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
}

func TestTrimShrinksTheHostFile(t *testing.T) {
	dir, image, data := disk(t)
	bind(t, data, dir+"/bound") // the same device twice
	content := make([]byte, 32<<20)
	if _, err := rand.Read(content); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(data+"/big", content, 0o644); err != nil {
		t.Fatal(err)
	}
	syncFS(t, data)
	full := allocated(t, image)
	if err := os.Remove(data + "/big"); err != nil {
		t.Fatal(err)
	}
	syncFS(t, data)
	_, p := newBelow(t, dir)
	got, err := p.Trim(testenv.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Disks) != 1 || got.Disks[0].Err != nil || got.Total() < 32<<20 {
		t.Errorf("trimmed %s (%d disks), want one with at least 32 MiB", got, len(got.Disks))
	}
	if want := fmt.Sprintf("%s: %d bytes", data, got.Total()); got.String() != want {
		t.Errorf("result = %q, want %q", got, want)
	}
	if after := allocated(t, image); full-after < 30<<20 {
		t.Errorf("the host file took %d bytes before and %d after the trim", full, after)
	}
}

// TestTrimSeesThroughCovers hides a mount point below another mount.
func TestTrimSeesThroughCovers(t *testing.T) {
	dir, _, data := disk(t)
	bind(t, data, dir+"/bound")
	if err := unix.Mount("tmpfs", data, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("cover: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(data, unix.MNT_DETACH) })
	_, p := newBelow(t, dir)
	got, err := p.Trim(testenv.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Disks) != 1 || got.Disks[0].Point != dir+"/bound" || got.Disks[0].Err != nil {
		t.Errorf("trimmed %s, want the view at %s/bound", got, dir)
	}
}

func TestTrimOfWhatCannot(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	all, err := System(false).Mounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.Point == dir {
			_, err := System(false).Trim(m)
			d := Trimmed{Disks: []TrimmedDisk{{Point: dir, Err: err}}}
			if err == nil || !strings.HasSuffix(d.String(), "can't discard") {
				t.Errorf("trim of a tmpfs: %v, told as %q", err, d)
			}
			return
		}
	}
	t.Errorf("%s is not among the mounts", dir)
}

func syncFS(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatalf("syncfs: %v", err)
	}
}

// allocated returns the bytes that a file takes on its disk.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
