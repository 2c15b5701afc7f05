package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Leftover is one thing that a cluster left.
type Leftover struct {
	What string
	// Remove takes it away. Nil: only the distribution's reset can.
	Remove func(context.Context) error
}

// remove removes what can be, in order.
func remove(ctx context.Context, all []Leftover) error {
	var errs []error
	for _, l := range all {
		if l.Remove == nil {
			continue
		}
		if err := l.Remove(ctx); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", l.What, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// Leftovers implements Machine. They are in the order in which they can go:
// containers, those who look after them, and what was mounted and wired for
// them.
func (s System) Leftovers(l Leftovers) ([]Leftover, error) {
	var all []Leftover
	for _, name := range l.Cgroups {
		dir := filepath.Join(s.Cgroups, name)
		if _, err := os.Stat(dir); err == nil {
			all = append(all, Leftover{"cgroup " + name, func(ctx context.Context) error { return killCgroup(ctx, dir) }})
		}
	}
	shims, err := findShims("/proc", l.ShimNamespaces)
	if err != nil {
		return nil, err
	}
	for _, look := range []func(Leftovers) ([]Leftover, error){findMounts, findNamespaces, findInterfaces, findNetfilter} {
		found, err := look(l)
		if err != nil {
			return nil, err
		}
		shims = append(shims, found...)
	}
	return append(all, shims...), nil
}

// findShims lists containerd's shims of the namespaces.
func findShims(proc string, namespaces []string) ([]Leftover, error) {
	if len(namespaces) == 0 {
		return nil, nil
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var all []Leftover
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline := func() string {
			b, _ := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
			return string(b)
		}
		before := cmdline()
		if !isShim(strings.Split(before, "\x00"), namespaces) {
			continue
		}
		all = append(all, Leftover{"shim " + e.Name(), func(ctx context.Context) error {
			return killProcess(ctx, pid, func() bool { return cmdline() == before })
		}})
	}
	return all, nil
}

func isShim(argv, namespaces []string) bool {
	if !strings.HasPrefix(filepath.Base(argv[0]), "containerd-shim") {
		return false
	}
	i := slices.Index(argv, "-namespace")
	return i >= 0 && i+1 < len(argv) && slices.Contains(namespaces, argv[i+1])
}

// killProcess kills a process and waits for its end. Same tells whether the pid
// is still that of the process that was meant.
func killProcess(ctx context.Context, pid int, same func() bool) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !same() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for deadline := time.Now().Add(killTime); ; {
		left := time.Until(deadline)
		if left <= 0 || ctx.Err() != nil {
			return fmt.Errorf("process %d does not end", pid)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(min(left, time.Second).Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return nil
		}
	}
}

// mountPoints returns where something is mounted, the newest last.
func mountPoints() ([]string, error) {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			points = append(points, unescape(fields[4]))
		}
	}
	return points, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	for i := 0; i+3 < len(s); i++ {
		if s[i] != '\\' {
			continue
		}
		if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
			s = s[:i] + string([]byte{byte(n)}) + s[i+4:]
		}
	}
	return s
}

func findMounts(l Leftovers) ([]Leftover, error) {
	points, err := mountPoints()
	if err != nil {
		return nil, err
	}
	var all []Leftover
	for _, p := range slices.Backward(points) {
		if slices.ContainsFunc(l.Mounts, func(dir string) bool { return strings.HasPrefix(p, dir+"/") }) {
			all = append(all, Leftover{"mount " + p, func(context.Context) error { return unmount(p) }})
		}
	}
	return all, nil
}

func unmount(point string) error {
	err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil // it went with another
	}
	return err
}

// findNamespaces lists named network namespaces.
func findNamespaces(l Leftovers) ([]Leftover, error) {
	if l.Netns == "" {
		return nil, nil
	}
	names, err := filepath.Glob(l.Netns + "*")
	if err != nil {
		return nil, err
	}
	var all []Leftover
	for _, name := range names {
		all = append(all, Leftover{"network namespace " + name, func(context.Context) error {
			return errors.Join(unmount(name), os.RemoveAll(name))
		}})
	}
	return all, nil
}
