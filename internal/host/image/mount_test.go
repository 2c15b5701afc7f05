package image

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/testenv"
)

// TestMounted mounts an image as a sandbox does, read-only below an overlay,
// and looks at what the kernel makes of it. The image is the test's own; hutch
// itself never mounts one on the host.
func TestMounted(t *testing.T) {
	testenv.RequireRoot(t)
	s := newStore(t, Limits{})
	acl := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	many := file("many", "x").with(func(h *tar.Header) {
		// More than the inode holds, of several kinds: the kernel finds them only
		// when they stand in its order.
		for _, n := range []string{"user.zz", "user.b", "user.longer.name", "trusted.t", "security.x", "user.a"} {
			h.PAXRecords["SCHILY.xattr."+n] = strings.Repeat(n, 30)
		}
		h.PAXRecords["SCHILY.xattr."+aclAccess] = acl
	})
	img := mustBuild(t, s, Source{Stream: bytes.NewReader(pack(t, append(sample(), many)...))})
	root := mountOverlay(t, mustPath(t, s, img.Digest))

	var st, st2 unix.Stat_t
	at := func(p string) string { return filepath.Join(root, p) }
	if err := unix.Lstat(at("bin/app"), &st); err != nil || st.Mode != unix.S_IFREG|0o4755 || st.Nlink != 2 || st.Mtim.Sec != stamp.Unix() || st.Mtim.Nsec != 0 {
		t.Errorf("bin/app: %v, %+v", err, st)
	}
	if err := unix.Lstat(at("bin/app2"), &st2); err != nil || st2.Ino != st.Ino {
		t.Errorf("bin/app2 is no hard link of bin/app: %v", err)
	}
	if err := unix.Lstat(at("etc"), &st); err != nil || st.Uid != 70000 || st.Gid != 100001 || st.Mode&0o7777 != 0o2750 {
		t.Errorf("etc: %v, %+v", err, st)
	}
	if err := unix.Lstat(at("pipe"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		t.Errorf("pipe: %v, %+v", err, st)
	}
	for link, want := range map[string]string{"abs": "/etc/passwd", "longlink": strings.Repeat("x/", 100)} {
		if got, err := os.Readlink(at(link)); err != nil || got != want {
			t.Errorf("%s leads to %q, %v", link, got, err)
		}
	}
	for p, want := range map[string]string{
		"größe\xff": "not UTF-8\n", "empty": "",
		"holes": "start" + strings.Repeat("\x00", 1<<20) + "end",
		strings.Repeat("n", 200) + "/" + strings.Repeat("n", 200): "deep\n",
	} {
		if got, err := os.ReadFile(at(p)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", p, len(got), err)
		}
	}
	wantXattrs(t, at("etc/passwd"), map[string]string{"security.capability": capability, "user.note": strings.Repeat("v", 300), "user.a": ""})
	wantXattrs(t, at("many"), map[string]string{
		"user.zz": strings.Repeat("user.zz", 30), "user.b": strings.Repeat("user.b", 30), "user.a": strings.Repeat("user.a", 30),
		"user.longer.name": strings.Repeat("user.longer.name", 30), "trusted.t": strings.Repeat("trusted.t", 30),
		"security.x": strings.Repeat("security.x", 30), aclAccess: acl,
	})
	for _, gone := range []string{"trusted.overlay.opaque", "com.apple.provenance"} {
		if _, err := unix.Lgetxattr(at("etc/passwd"), gone, nil); err == nil {
			t.Errorf("%s came through", gone)
		}
	}
	if err := os.WriteFile(at("bin/new"), nil, 0o644); err != nil {
		t.Errorf("write into the overlay: %v", err)
	}
	if err := os.Remove(at("etc/passwd")); err != nil {
		t.Errorf("remove through the overlay: %v", err)
	}
	// Every file can be read to its end.
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		_, err = os.ReadFile(p)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func wantXattrs(t *testing.T, path string, want map[string]string) {
	t.Helper()
	for name, v := range want {
		buf := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil || string(buf[:n]) != v {
			t.Errorf("%s of %s: %q, %v; want %q", name, filepath.Base(path), buf[:max(n, 0)], err, v)
		}
	}
}

// mountOverlay mounts an image through a loop device and an overlay over it.
func mountOverlay(t *testing.T, image string) string {
	t.Helper()
	tmp := t.TempDir()
	lower, merged := filepath.Join(tmp, "lower"), filepath.Join(tmp, "merged")
	for _, d := range []string{lower, merged, filepath.Join(tmp, "upper"), filepath.Join(tmp, "work")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mount", "-o", "loop,ro", "-t", "ext4", image, lower).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() { unmount(t, lower) })
	opts := "lowerdir=" + lower + ",upperdir=" + filepath.Join(tmp, "upper") + ",workdir=" + filepath.Join(tmp, "work")
	if err := syscall.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		t.Fatalf("mount the overlay: %v", err)
	}
	t.Cleanup(func() { unmount(t, merged) })
	return merged
}

func unmount(t *testing.T, dir string) {
	if err := syscall.Unmount(dir, 0); err != nil {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

// TestDiskFull builds on a filesystem that is too small at every stage.
func TestDiskFull(t *testing.T) {
	root := pack(t, file("noise", noisy(8<<20)))
	for _, mb := range []string{"1", "9", "12", "15"} { // in the spool, and in the image
		dir := testenv.SmallDisk(t, mb+"m")
		s, err := Open(Params{Images: dir + "/images", Work: dir + "/work", Trash: dir + "/trash"})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Build(testenv.Context(t), Source{Stream: bytes.NewReader(root)}, nil)
		if !fault.Is(err, fault.Exhausted) {
			t.Errorf("with %s MiB: class %v: %v", mb, fault.Of(err), err)
		}
		if left := append(names(t, s.p.Work), names(t, s.p.Images)...); len(left) > 0 {
			t.Errorf("with %s MiB, left %q", mb, left)
		}
	}
}
