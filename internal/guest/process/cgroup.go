package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// groups is the set of cgroups below one root, one for each tree. One inotify
// descriptor sees them all become empty; that removes them.
type groups struct {
	root string // empty: no cgroups here
	log  *slog.Logger

	watch *os.File // inotify
	done  chan struct{}

	mu   sync.Mutex
	next uint64
	live map[int32]*group // by watch descriptor
}

// group is the cgroup of one tree. Gone is closed when it was removed.
type group struct {
	set  *groups
	dir  string
	gone chan struct{}

	mu     sync.Mutex
	wd     int32
	leader bool // the first process may still need the directory
}

// openGroups takes over root, which must be on a cgroup2 filesystem, and
// adopts the groups that an earlier agent left there.
func openGroups(root string, log *slog.Logger) (*groups, error) {
	g := &groups{root: root, log: log, done: make(chan struct{}), live: map[int32]*group{}}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup %s: %w", root, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("look at cgroup %s: %w", root, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("%s is not on a cgroup2 filesystem", root)
	}
	// Without the memory controller out-of-memory kills can't be told apart,
	// nothing else is lost.
	for _, c := range []string{"memory", "pids", "cpu"} {
		_ = writeKernel(filepath.Join(root, "cgroup.subtree_control"), "+"+c)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch cgroups: %w", err)
	}
	g.watch = os.NewFile(uintptr(fd), "inotify")
	old, err := os.ReadDir(root)
	if err != nil {
		_ = g.watch.Close()
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	go g.run()
	for _, e := range old {
		n, err := strconv.ParseUint(strings.TrimPrefix(e.Name(), "p"), 10, 64)
		if !e.IsDir() || err != nil {
			continue
		}
		g.next = max(g.next, n)
		gr := &group{set: g, dir: filepath.Join(root, e.Name()), gone: make(chan struct{})}
		if err := gr.follow(); err != nil {
			g.log.Warn("cgroup of an earlier agent can't be watched", "cgroup", gr.dir, "err", err)
			continue
		}
		gr.tidy()
	}
	return g, nil
}

// create makes the cgroup of a new tree. It stays until release was called and
// the last process has left it.
func (g *groups) create() (*group, error) {
	g.mu.Lock()
	g.next++
	dir := filepath.Join(g.root, "p"+strconv.FormatUint(g.next, 10))
	g.mu.Unlock()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	gr := &group{set: g, dir: dir, gone: make(chan struct{}), leader: true}
	if err := gr.follow(); err != nil {
		_ = os.Remove(dir)
		return nil, err
	}
	return gr, nil
}

func (gr *group) follow() error {
	var wd int
	err := control(gr.set.watch, func(fd int) error {
		gr.set.mu.Lock()
		defer gr.set.mu.Unlock()
		var err error
		wd, err = unix.InotifyAddWatch(fd, filepath.Join(gr.dir, "cgroup.events"), unix.IN_MODIFY)
		if err == nil {
			gr.wd = int32(wd)
			gr.set.live[gr.wd] = gr
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("watch cgroup %s: %w", gr.dir, err)
	}
	return nil
}

// run removes groups as they become empty, until the watch is closed.
func (g *groups) run() {
	defer close(g.done)
	buf := make([]byte, 16<<10)
	for {
		n, err := g.watch.Read(buf)
		if err != nil {
			return
		}
		for _, gr := range g.named(buf[:n]) {
			gr.tidy()
		}
	}
}

// named returns the groups that the inotify events in buf speak of; all of
// them after an overflow.
func (g *groups) named(buf []byte) []*group {
	g.mu.Lock()
	defer g.mu.Unlock()
	var found []*group
	for len(buf) >= unix.SizeofInotifyEvent {
		wd := int32(nativeUint32(buf[0:]))
		mask := nativeUint32(buf[4:])
		size := unix.SizeofInotifyEvent + int(nativeUint32(buf[12:]))
		if mask&unix.IN_Q_OVERFLOW != 0 {
			for _, gr := range g.live {
				found = append(found, gr)
			}
			return found
		}
		if gr := g.live[wd]; gr != nil {
			found = append(found, gr)
		}
		buf = buf[min(size, len(buf)):]
	}
	return found
}

// release says that the first process is gone, so that an empty group may go.
func (gr *group) release() {
	gr.mu.Lock()
	gr.leader = false
	gr.mu.Unlock()
	gr.tidy()
}

// tidy removes the group if nothing is in it any more.
func (gr *group) tidy() {
	gr.mu.Lock()
	defer gr.mu.Unlock()
	if gr.isGone() || gr.leader {
		return
	}
	if err := gr.remove(); err != nil {
		// A process that is just leaving; its departure is another event.
		gr.set.log.Debug("cgroup not removed yet", "cgroup", gr.dir, "err", err)
		return
	}
	gr.set.mu.Lock()
	delete(gr.set.live, gr.wd)
	gr.set.mu.Unlock()
	close(gr.gone)
}

// remove removes the group, after those that a program of the tree made below
// its own. Mostly there are none, and nobody is left: that takes one call.
func (gr *group) remove() error {
	err := unix.Rmdir(gr.dir)
	switch {
	case err == nil || errors.Is(err, unix.ENOENT):
		return nil
	case gr.populated():
		return err
	}
	return removeTree(gr.dir)
}

func (gr *group) isGone() bool {
	select {
	case <-gr.gone:
		return true
	default:
		return false
	}
}

func (gr *group) populated() bool {
	data, err := readKernel(filepath.Join(gr.dir, "cgroup.events"))
	return err == nil && strings.Contains(data, "populated 1")
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// kill ends every process of the group with SIGKILL. It returns when the
// signals are on their way.
func (gr *group) kill() error {
	err := writeKernel(filepath.Join(gr.dir, "cgroup.kill"), "1")
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(gr.dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return gr.killFrozen()
}

// killFrozen is kill for kernels before 5.14: it holds everything still, so
// that no fork gets away, and signals one by one. A frozen process does die of
// SIGKILL.
func (gr *group) killFrozen() error {
	freeze := filepath.Join(gr.dir, "cgroup.freeze")
	if err := writeKernel(freeze, "1"); err != nil {
		return err
	}
	defer func() { _ = writeKernel(freeze, "0") }()
	return gr.signal(unix.SIGKILL)
}

// signal sends sig to every process of the group, and again to those that came
// up meanwhile. It gives up chasing a tree that forks faster than that.
func (gr *group) signal(sig unix.Signal) error {
	seen := map[int]bool{}
	var first error
	for range 10 {
		fresh := 0
		for _, pid := range gr.pids() {
			if seen[pid] {
				continue
			}
			seen[pid] = true
			fresh++
			if err := gr.signalOne(pid, sig); err != nil && first == nil {
				first = err
			}
		}
		if fresh == 0 {
			break
		}
	}
	return first
}

// signalOne looks again at where pid belongs after it took hold of it: the
// number may have gone to somebody else since it was read.
func (gr *group) signalOne(pid int, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if !gr.contains(pid) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", pid, err)
	}
	return nil
}

// contains asks the process itself, so that the cost does not grow with the
// size of the tree.
func (gr *group) contains(pid int) bool {
	data, _ := readKernel("/proc/" + strconv.Itoa(pid) + "/cgroup")
	own := "/" + filepath.Base(gr.set.root) + "/" + filepath.Base(gr.dir)
	for line := range strings.Lines(data) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if ok && (strings.HasSuffix(path, own) || strings.Contains(path, own+"/")) {
			return true
		}
	}
	return false
}

// pids lists the processes of the group and of the groups below it.
func (gr *group) pids() []int {
	var pids []int
	_ = filepath.WalkDir(gr.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return nil
		}
		data, _ := readKernel(filepath.Join(path, "cgroup.procs"))
		for line := range strings.Lines(data) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

func (gr *group) oomKilled() bool {
	data, _ := readKernel(filepath.Join(gr.dir, "memory.events"))
	return oomKills(data)
}

// all returns every group that is there now.
func (g *groups) all() []*group {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]*group, 0, len(g.live))
	for _, gr := range g.live {
		list = append(list, gr)
	}
	return list
}

// wait returns when the group is gone or ctx ends.
func (gr *group) wait(ctx context.Context) error {
	select {
	case <-gr.gone:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close stops watching. Groups that still have processes stay as they are.
func (g *groups) close() {
	_ = g.watch.Close()
	<-g.done
}
