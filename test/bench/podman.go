package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// podman runs containers with crun, from the same image's files, in directories
// of its own. It is what no isolation costs: host's kernel, no machine.
type podman struct {
	dir    string
	cgroup string // its containers', below the root of each hierarchy
	env    []string
	limits []string
	mounts *ownMounts
}

const (
	podmanImage = "localhost/hutch-bench"
	podmanName  = "hutch-bench"
	// podmanLimit is how many files and processes a container may have.
	podmanLimit = 1024
)

func (b *bench) preparePodman(ctx context.Context, told *rivalReport) (_ *rival, err error) {
	p := &podman{dir: filepath.Join(b.scratch, "podman"), cgroup: fmt.Sprintf("hutch-bench-%d", os.Getpid())}
	if p.mounts, err = newOwnMounts(hideSecondTree); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.end())
		}
	}()
	if err := p.configure(); err != nil {
		return nil, err
	}
	if err := p.load(ctx, b.bare.disks["root"]); err != nil {
		return nil, err
	}
	once := p.args("run", "--rm", podmanImage, "/bin/true")
	again := []string{"podman", "exec", podmanName, "/bin/true"}
	told.Commands = [][]string{once, again}
	if err := p.run(ctx, once...); err != nil {
		return nil, err
	}
	if err := p.run(ctx, p.args("run", "-d", "--name", podmanName, podmanImage, "/bin/sleep", "86400")...); err != nil {
		return nil, err
	}
	timed := func(argv []string) func(context.Context) ([]time.Duration, error) {
		return func(ctx context.Context) ([]time.Duration, error) {
			took, err := clocked(func() error { return p.run(ctx, argv...) })
			return []time.Duration{took}, err
		}
	}
	return &rival{
		starts: []side{{name: "podman run, crun", do: timed(once)}},
		execs:  []side{{name: "podman exec, crun", do: timed(again)}},
		end:    p.end,
	}, nil
}

// hideSecondTree takes away a tree of cgroup2 beside those of cgroup v1: crun
// refuses a host while such a tree has controllers.
func hideSecondTree() error {
	const tree = "/sys/fs/cgroup/unified"
	var fs unix.Statfs_t
	if unix.Statfs(tree, &fs) != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil
	}
	return unix.Unmount(tree, unix.MNT_DETACH)
}

// configure writes podman's configuration: nothing of it is shared with a podman
// that this host may have besides.
func (p *podman) configure() error {
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		return err
	}
	containers, storage := filepath.Join(p.dir, "containers.conf"), filepath.Join(p.dir, "storage.conf")
	engine := "[engine]\nlock_type = \"file\"\nevents_logger = \"none\"\ncgroup_manager = \"cgroupfs\"\nruntime = \"crun\"\n"
	disk := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(p.dir, "root"), filepath.Join(p.dir, "run"))
	p.env = append(os.Environ(), "CONTAINERS_CONF="+containers, "CONTAINERS_STORAGE_CONF="+storage, "TMPDIR="+p.dir)
	for name, limit := range map[string]int{"nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC} {
		var l unix.Rlimit
		if err := unix.Getrlimit(limit, &l); err != nil {
			return err
		}
		// Its own defaults may be more than this host lets it have.
		p.limits = append(p.limits, "--ulimit", fmt.Sprintf("%s=%d:%[2]d", name, min(l.Max, podmanLimit)))
	}
	return errors.Join(os.WriteFile(containers, []byte(engine), 0o600), os.WriteFile(storage, []byte(disk), 0o600))
}

// load makes an image of the files of the template's.
func (p *podman) load(ctx context.Context, image string) error {
	tree, archive := filepath.Join(p.dir, "tree"), filepath.Join(p.dir, "image.tar")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	for _, argv := range [][]string{
		{"debugfs", "-R", "rdump / " + tree, image}, {"tar", "-C", tree, "--exclude=./lost+found", "-cf", archive, "."},
		{"podman", "import", "-q", archive, podmanImage},
	} {
		if err := p.run(ctx, argv...); err != nil {
			return err
		}
	}
	return nil
}

// args are those of a run, with what is common to all.
func (p *podman) args(verb string, rest ...string) []string {
	argv := []string{"podman", verb, "--network", "none", "--pull", "never", "--log-driver", "none", "--cgroup-parent", "/" + p.cgroup}
	return append(append(argv, p.limits...), rest...)
}

// run runs a program among podman's mounts.
func (p *podman) run(ctx context.Context, argv ...string) error {
	return p.mounts.do(func() error {
		if argv[0] == "podman" {
			argv = append([]string{"podman", "--tmpdir", filepath.Join(p.dir, "tmp")}, argv[1:]...)
		}
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		c.Env = p.env
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", filepath.Base(argv[0]), argv[min(3, len(argv)-1)], err, lastLine(out))
		}
		return nil
	})
}

// end removes the containers and what they had.
func (p *podman) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), rivalEnd)
	defer cancel()
	err := p.run(ctx, "podman", "rm", "--all", "--force", "--time", "0")
	err = errors.Join(err, awaitNoProcess(ctx, p.dir))
	p.mounts.close()
	return errors.Join(err, removeCgroups(p.cgroup), os.RemoveAll(p.dir))
}

// removeCgroups removes a group and those in it from all hierarchies.
func removeCgroups(name string) error {
	tops, err := filepath.Glob("/sys/fs/cgroup/*/" + name)
	for _, top := range append(tops, "/sys/fs/cgroup/"+name) {
		var dirs []string
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error { // what can't be read shows below
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs) // those within come first
		for _, d := range dirs {
			err = errors.Join(err, os.Remove(d))
		}
	}
	return err
}

// awaitNoProcess waits for the end of all processes that have a text among their
// arguments, and are nobody's to wait for.
func awaitNoProcess(ctx context.Context, text string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return err
		}
		left := ""
		for _, l := range lines {
			if b, err := os.ReadFile(l); err == nil && strings.Contains(string(b), text) {
				left = strings.ReplaceAll(string(b), "\x00", " ")
			}
		}
		if left == "" {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("a process does not end: %s", left)
		}
	}
}
