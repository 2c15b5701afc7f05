package jail

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchies is where the host has its cgroups mounted.
type hierarchies struct {
	v2 string            // mount point, when it has the controllers
	v1 map[string]string // controller → mount point
}

// wanted lists the controllers that limits need.
func wanted() []string { return []string{"memory", "pids", "cpu"} }

// findHierarchies reads /proc/self/mountinfo, whose form is in proc(5). The v2
// tree is used when it has the memory and pids controllers, else whatever
// v1 controllers there are.
func findHierarchies(mountinfo string) hierarchies {
	h := hierarchies{v1: map[string]string{}}
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 || left[3] != "/" {
			continue
		}
		switch point := left[4]; right[0] {
		case "cgroup2":
			b, err := os.ReadFile(filepath.Join(point, "cgroup.controllers"))
			has := " " + strings.TrimSpace(string(b)) + " "
			if err == nil && strings.Contains(has, " memory ") && strings.Contains(has, " pids ") {
				h.v2 = point
			}
		case "cgroup":
			for _, option := range strings.Split(right[2], ",") {
				for _, c := range wanted() {
					if option == c {
						h.v1[c] = point
					}
				}
			}
		}
	}
	return h
}

// groups are the cgroups of one jail.
type groups struct {
	version string // "v1", "v2", ""
	// parents are the parent cgroup's directories, by controller for v1, the
	// one of v2 under "".
	parents map[string]string
	// missing are limits that the parent cannot hand down.
	missing []string
}

// entry is how a child gets into its cgroup: born in dir (v2), or by the
// forking thread's entering the directories threads (v1).
type entry struct {
	dir     *os.File
	threads []string
}

func openGroups(h hierarchies, parent string) (groups, error) {
	g := groups{parents: map[string]string{}}
	switch {
	case h.v2 != "":
		g.version = "v2"
		dir := filepath.Join(h.v2, parent)
		if err := mkdir(dir); err != nil {
			return g, err
		}
		g.parents[""] = dir
		for _, d := range []string{h.v2, dir} {
			for _, c := range wanted() {
				if err := set(d, "cgroup.subtree_control", "+"+c); err != nil {
					g.missing = append(g.missing, fmt.Sprintf("cgroup controller %s: %v", c, err))
				}
			}
		}
		g.missing = append(g.missing, setAll(dir, []setting{{"cpu.weight", strconv.Itoa(min(100*runtime.NumCPU(), 10000))}})...)
	case len(h.v1) > 0:
		g.version = "v1"
		for c, point := range h.v1 {
			dir := filepath.Join(point, parent)
			if err := mkdir(dir); err != nil {
				return g, err
			}
			g.parents[c] = dir
		}
		if dir := g.parents["cpu"]; dir != "" {
			g.missing = append(g.missing, setAll(dir, []setting{{"cpu.shares", strconv.Itoa(1024 * runtime.NumCPU())}})...)
		}
		for _, c := range wanted() {
			if g.parents[c] == "" {
				g.missing = append(g.missing, "cgroup controller "+c+": the host has none")
			}
		}
	default:
		g.missing = append(g.missing, "cgroups: the host has none with limits")
	}
	return g, nil
}

func mkdir(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make cgroup: %w", err)
	}
	return nil
}

func set(dir, file, value string) error {
	// No O_CREAT: what the kernel does not offer must be an error.
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

type setting struct{ file, value string }

func setAll(dir string, settings []setting) (missing []string) {
	for _, s := range settings {
		if err := set(dir, s.file, s.value); err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", s.file, err))
		}
	}
	return missing
}

// checkEmpty refuses a name whose cgroup has processes.
func (g groups) checkEmpty(name string) error {
	for _, parent := range g.parents {
		pids, err := members(filepath.Join(parent, name))
		if err != nil {
			return err
		}
		if len(pids) > 0 {
			return fmt.Errorf("cgroup %s is in use by processes %v", name, pids)
		}
	}
	return nil
}

// create makes the cgroup of c with its limits. An empty one that was left
// behind is taken.
func (g groups) create(c Cell, report *Report) (entry, error) {
	report.Cgroup = g.version
	report.Missing = append(report.Missing, g.missing...)
	var enter entry
	for controller, parent := range g.parents {
		dir := filepath.Join(parent, c.Name)
		if err := mkdir(dir); err != nil {
			return enter, err
		}
		report.Missing = append(report.Missing, setAll(dir, c.settings(g.version, controller))...)
		if g.version == "v1" {
			enter.threads = append(enter.threads, dir)
			continue
		}
		f, err := os.Open(dir)
		if err != nil {
			return enter, fmt.Errorf("open cgroup: %w", err)
		}
		enter.dir = f
	}
	return enter, nil
}

// settings are the limits of c in one directory.
func (c Cell) settings(version, controller string) (s []setting) {
	memory := strconv.FormatInt(int64(c.MemoryMB)<<20, 10)
	pids := strconv.Itoa(c.PIDs)
	cpus := max(c.CPUs, 1)
	if version == "v2" {
		if c.MemoryMB > 0 {
			s = append(s, setting{"memory.max", memory})
		}
		if c.PIDs > 0 {
			s = append(s, setting{"pids.max", pids})
		}
		return append(s, setting{"cpu.weight", strconv.Itoa(min(100*cpus, 10000))})
	}
	switch {
	case controller == "memory" && c.MemoryMB > 0:
		s = append(s, setting{"memory.limit_in_bytes", memory})
	case controller == "pids" && c.PIDs > 0:
		s = append(s, setting{"pids.max", pids})
	case controller == "cpu":
		s = append(s, setting{"cpu.shares", strconv.Itoa(min(1024*cpus, 262144))})
	}
	return s
}

// members returns the processes of a cgroup; none when it is not there.
func members(dir string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read cgroup: %w", err)
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("read cgroup %s: %w", dir, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Remove removes the cgroup of an ended program. It waits until the last
// thread has left it, and is idempotent.
func (j *Jail) Remove(ctx context.Context, name string) error {
	if !validName(name) {
		return fmt.Errorf("remove cgroup: %q is no name for one", name)
	}
	var errs []error
	for _, parent := range j.groups.parents {
		errs = append(errs, rmdir(ctx, filepath.Join(parent, name)))
	}
	return errors.Join(errs...)
}

// rmdir removes an empty cgroup. Threads leave a cgroup a moment after their
// end is seen, and v1 tells nobody when, so it tries again.
func rmdir(ctx context.Context, dir string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup %s: %w: %w", dir, err, ctx.Err())
		case <-tick.C:
		}
	}
}

// OOMKills tells how many processes of the named cgroup the kernel ended for
// want of memory. It is 0 when that is not known.
func (j *Jail) OOMKills(name string) int {
	file := map[string]string{"v1": "memory.oom_control", "v2": "memory.events"}[j.groups.version]
	parent := j.groups.parents[map[string]string{"v1": "memory"}[j.groups.version]]
	if file == "" || parent == "" || !validName(name) {
		return 0
	}
	b, err := os.ReadFile(filepath.Join(parent, name, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		var n int
		if _, err := fmt.Sscanf(line, "oom_kill %d", &n); err == nil {
			return n
		}
	}
	return 0
}
