package testenv

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestDiff(t *testing.T) {
	before := Host{things: map[string]bool{"file /a": true, "mount /b": true}}
	after := Host{things: map[string]bool{"file /a": true, "link c": true}}
	if got, want := before.Diff(after), "+ link c\n- mount /b"; got != want {
		t.Errorf("diff = %q, want %q", got, want)
	}
	if got := before.Diff(before); got != "" {
		t.Errorf("diff of equals = %q", got)
	}
}

func TestCheckHostSeesFiles(t *testing.T) {
	dir := t.TempDir()
	r := &recorder{}
	CheckHost(r, Scope{Dirs: []string{dir, filepath.Join(dir, "missing")}})
	if err := os.Mkdir(filepath.Join(dir, "left"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := Host{}
	diff, err := settle(before, Scope{Dirs: []string{dir}}, 0)
	if err != nil || !strings.Contains(diff, "+ file "+dir+"/left") {
		t.Errorf("diff = %q, %v; want the left directory in it", diff, err)
	}
	if err := os.Remove(filepath.Join(dir, "left")); err != nil {
		t.Fatal(err)
	}
	r.cleanup()
	if len(r.errors) != 0 {
		t.Errorf("a clean host is reported: %s", r.errors)
	}
}

func TestLookSeesProcesses(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	mark := t.TempDir()
	scope := Scope{Programs: []string{filepath.Base(self)}, ProgramsWith: mark}
	before := Snapshot(t, scope)
	cmd := exec.Command(self, "wait-on-stdin", mark)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	diff := before.Diff(Snapshot(t, scope))
	_ = in.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("helper: %v", err)
	}
	if !strings.Contains(diff, "+ process ") || strings.Count(diff, "\n") != 0 {
		t.Errorf("diff with a process = %q, want one line", diff)
	}
	if diff := before.Diff(Snapshot(t, scope)); diff != "" {
		t.Errorf("diff after its end = %q", diff)
	}
}

// TestLookSeesKernelObjects makes one of each in namespaces of its own.
func TestLookSeesKernelObjects(t *testing.T) {
	RequireRoot(t)
	dir := t.TempDir()
	scope := Scope{LinkPrefix: "te-", NFTPrefix: "te_", Mounts: []string{dir}, NetnsDir: filepath.Join(dir, "netns")}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its namespaces
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		before, err := look(scope)
		if err != nil {
			t.Errorf("look: %v", err)
			return
		}
		if err := makeObjects(dir); err != nil {
			t.Errorf("make objects: %v", err)
			return
		}
		after, err := look(scope)
		if err != nil {
			t.Errorf("look again: %v", err)
			return
		}
		diff := before.Diff(after)
		for _, want := range []string{
			"+ link te-one", "+ nftables table te_t", "set addresses element 0a000001", "+ netns " + dir + "/netns/x",
		} {
			if !strings.Contains(diff, want) {
				t.Errorf("diff lacks %q:\n%s", want, diff)
			}
		}
	}()
	<-done
}

func makeObjects(dir string) error {
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "te-one"}}); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "netns"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "netns", "x"), nil, 0o600); err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "te_t"})
	set := &nftables.Set{Table: table, Name: "addresses", KeyType: nftables.TypeIPAddr}
	element := nftables.SetElement{Key: net.IPv4(10, 0, 0, 1).To4()}
	if err := c.AddSet(set, []nftables.SetElement{element}); err != nil {
		return err
	}
	return c.Flush()
}

func TestLookSeesMountsAndLoops(t *testing.T) {
	RequireRoot(t)
	dir := t.TempDir()
	scope := Scope{Mounts: []string{dir}, LoopFiles: dir}
	before := Snapshot(t, scope)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	diff := before.Diff(Snapshot(t, scope))
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatalf("unmount: %v", err)
	}
	if want := "+ mount tmpfs on " + dir + " type tmpfs (root /)"; diff != want {
		t.Errorf("diff = %q, want %q", diff, want)
	}
	if diff := before.Diff(Snapshot(t, scope)); diff != "" {
		t.Errorf("diff after the unmount = %q", diff)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`/a\040b`: "/a b", `\134`: `\`, `/plain`: "/plain", `\04`: `\04`, `\999`: `\999`,
	} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLookSeesLoopDevices(t *testing.T) {
	RequireRoot(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "disk image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	scope := Scope{LoopFiles: dir}
	before := Snapshot(t, scope)
	out, err := exec.CommandContext(Context(t), "losetup", "--find", "--show", image).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	device := strings.TrimSpace(string(out))
	diff := before.Diff(Snapshot(t, scope))
	if err := exec.CommandContext(Context(t), "losetup", "--detach", device).Run(); err != nil {
		t.Fatalf("detach %s: %v", device, err)
	}
	if want := "+ loop " + filepath.Base(device) + " of " + image; diff != want {
		t.Errorf("diff = %q, want %q", diff, want)
	}
	if diff, err := settle(before, scope, hostGrace); diff != "" || err != nil {
		t.Errorf("diff after it went = %q, %v", diff, err)
	}
}

func TestLookSeesCgroups(t *testing.T) {
	// Directories stand for cgroups: only directories count, in every
	// hierarchy that the pattern names.
	dir := t.TempDir()
	for _, d := range []string{"cpu/hutch", "memory/hutch"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	scope := Scope{Cgroups: []string{dir + "/*/hutch"}}
	before := Snapshot(t, scope)
	if err := os.MkdirAll(filepath.Join(dir, "memory/hutch/sb-1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cpu/hutch/tasks"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := "+ cgroup " + dir + "/memory/hutch/sb-1 (d---------)"
	if diff := before.Diff(Snapshot(t, scope)); diff != want {
		t.Errorf("diff = %q, want %q", diff, want)
	}
	if _, err := look(Scope{Cgroups: []string{"["}}); err == nil {
		t.Error("a bad pattern is no error")
	}
}
