package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/supervise"
)

// System is the machine itself. Its methods need root.
type System struct {
	// Cgroups is the root of the cgroup2 filesystem.
	Cgroups string
	// Own is a cgroup that a reset may make for itself, in a directory that is
	// there.
	Own string
	// Modules loads kernel modules.
	Modules func(names ...string) error
}

// Prepare implements Machine.
func (s System) Prepare(_ context.Context, d Distribution) (warnings []string, err error) {
	// The one that nodeLink is made of is not the distribution's affair.
	if err := s.Modules(append([]string{"dummy"}, d.Modules...)...); err != nil {
		warnings = append(warnings, shorten("kernel modules: "+err.Error()))
	}
	for _, key := range slices.Sorted(maps.Keys(d.Sysctls)) {
		file := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
		if err := os.WriteFile(file, []byte(d.Sysctls[key]), 0); err != nil {
			warnings = append(warnings, fmt.Sprintf("set %s: %v", key, err))
		}
	}
	for _, dir := range d.Data {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return warnings, err
		}
	}
	// What is mounted for a pod must be seen by the kubelet, and the other way.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return warnings, fmt.Errorf("share the mounts below /: %w", err)
	}
	if err := addNodeLink(nodeIP); err != nil {
		return warnings, fmt.Errorf("give the node the address %s: %w", nodeIP, err)
	}
	return warnings, nil
}

// Restore implements Machine.
func (s System) Restore() error { return dropLink(nodeLink) }

// Reset implements Machine. What is left of the program when its time is over
// is killed.
func (s System) Reset(ctx context.Context, r Reset, env []string) error {
	limit := seconds(r.Timeout, defaultResetTimeout)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c := exec.CommandContext(ctx, r.Command[0], r.Command[1:]...)
	c.Dir = "/"
	c.Env = append([]string{"PATH=" + supervise.Path, "HOME=/root"}, env...)
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	leave, err := s.enter(c)
	if err != nil {
		return fmt.Errorf("run %s: %w", r.Command[0], err)
	}
	defer leave()
	c.Cancel = func() error { return unix.Kill(-c.Process.Pid, unix.SIGKILL) }
	c.WaitDelay = time.Second
	said := &tail{}
	c.Stdout, c.Stderr = said, said
	err = c.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("it was killed after %s", limit)
	}
	if err != nil {
		return fmt.Errorf("run %s: %w: %s", strings.Join(r.Command, " "), err, shorten(said.String()))
	}
	return nil
}

// enter has c be born in a cgroup of its own.
func (s System) enter(c *exec.Cmd) (leave func(), err error) {
	if err := os.Mkdir(s.Own, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	dir, err := os.OpenFile(s.Own, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	c.SysProcAttr.UseCgroupFD, c.SysProcAttr.CgroupFD = true, int(dir.Fd())
	return func() {
		_ = dir.Close()
		_ = killCgroup(context.Background(), s.Own)
	}, nil
}

// tail keeps the end of what a program says.
type tail struct{ b []byte }

const maxTail = 4 << 10

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > maxTail {
		t.b = append(t.b[:0], t.b[len(t.b)-maxTail:]...)
	}
	return len(p), nil
}

// String returns the last lines that fit into a detail.
func (t *tail) String() string {
	s := strings.TrimSpace(string(t.b))
	if len(s) > maxText {
		s = s[len(s)-maxText:]
	}
	return s
}

// killTime bounds the wait for killed processes.
const killTime = 5 * time.Second

// killCgroup kills what is in the cgroup and in those below it, and removes
// them. None at all is fine.
func killCgroup(ctx context.Context, dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if err = removeCgroup(dir); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// removeCgroup removes a cgroup without processes, and those below it.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove cgroup", Path: dir, Err: err}
	}
	return nil
}
