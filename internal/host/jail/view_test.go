package jail

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// shared is a directory of a user of its own, as it is given to a cell.
func shared(t *testing.T, readOnly bool) (dir string, tree *os.File) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, dir + "/file"} {
		if err := os.Chown(p, 64001, 64002); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if tree, err = Detach(f, readOnly); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	return dir, tree
}

func viewer(t *testing.T, tree *os.File, script string) Cell {
	c := shell(t, script)
	c.Name, c.UID = "cell_view", 64001
	c.View, c.Owners = &View{Tree: tree, At: "share"}, &Owners{GID: 64002, Base: 1_900_000_000}
	return c
}

func words(out string) (lines []string) {
	for l := range strings.Lines(out) {
		lines = append(lines, strings.Join(strings.Fields(l), " "))
	}
	return lines
}

func TestViewIsAllThereIs(t *testing.T) {
	j := newTest(t)
	_, tree := shared(t, true)
	c := viewer(t, tree, fmt.Sprintf(`cd /; echo $(ls); echo $(ls /proc/sys/*); cat /proc/sys/fs/file-max; stat -c "%%u %%g %%a" /share/file; echo $(id -u) $(id -g) $$
		for f in /file /usr/file /share/file /proc/sys/fs/file-max; do echo x 2>&- >$f && echo wrote $f; done
		mount -t tmpfs x /share 2>&- && echo mounted; kill -0 %[1]d 2>&- && echo sees; ls /proc/%[1]d 2>&-; ls /proc/1/task >&- 2>&- && echo sees 1
		echo $(ls /sys/class/net 2>&-) $(cut -d: -f1 /proc/self/net/dev | tail -n +3); grep NoNewPrivs /proc/self/status; ulimit -n; ulimit -c`, os.Getpid()))
	c.View.Settings = map[string]string{"fs/file-max": "123"}
	out, report := run(t, j, c)
	if len(report.Missing) > 0 && report.Cgroup != "" {
		t.Errorf("this host allows limits, but: %v", report.Missing)
	}
	var top []string // of "/", as the host has it
	for _, name := range []string{"bin", "lib", "lib64", "proc", "sbin", "share", "usr"} {
		if _, err := os.Lstat("/" + name); err == nil || name == "share" {
			top = append(top, name)
		}
	}
	want := []string{strings.Join(top, " "), "file-max", "123", "0 0 640", "0 0 1", "lo", "NoNewPrivs: 1", "100", "0"}
	if diff := cmp.Diff(want, words(out)); diff != "" {
		t.Errorf("the program said (-want +got):\n%s", diff)
	}
}

func TestViewWritesAsItsOwner(t *testing.T) {
	j := newTest(t)
	dir, tree := shared(t, false)
	// The path leads elsewhere now: the directory is the same.
	if err := os.Rename(dir, dir+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	out, _ := run(t, j, viewer(t, tree, `umask 022; cd /share && cat file && echo mine >new && echo other >other && chown 7:8 other && mknod dev c 1 3; ls`))
	t.Log(out)
	owner := func(name string) [2]uint32 {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir+".moved", name), &st); err != nil {
			t.Fatal(err)
		}
		return [2]uint32{st.Uid, st.Gid}
	}
	if diff := cmp.Diff([][2]uint32{{64001, 64002}, {1_900_000_006, 1_900_000_007}}, [][2]uint32{owner("new"), owner("other")}); diff != "" {
		t.Errorf("owners on the host (-want +got):\n%s", diff)
	}
	if strings.Contains(out, "\ndev\n") {
		t.Error("a device was made")
	}
}
