package reset

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Linux is the machine that this program runs on.
type Linux struct{}

// Shims implements [Machine].
func (Linux) Shims(namespace string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(line), "\x00")
		if !strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") {
			continue
		}
		for i, a := range args[:len(args)-1] {
			if a == "-namespace" && args[i+1] == namespace {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f))) // the pattern has digits only
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

// Kill implements [Machine].
func (Linux) Kill(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

const cgroupRoot = "/sys/fs/cgroup"

// EndCgroup implements [Machine].
func (Linux) EndCgroup(ctx context.Context, name string) (bool, error) {
	dir := filepath.Join(cgroupRoot, name)
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return true, fmt.Errorf("kill: %w", err)
	}
	if err := emptied(ctx, dir); err != nil {
		return true, err
	}
	return true, removeTree(dir)
}

// emptied waits until no process is in the cgroup: killed ones take their time to go.
func emptied(ctx context.Context, dir string) error {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		if err != nil {
			return err
		}
		if bytes.Contains(data, []byte("populated 0")) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for its processes: %w", ctx.Err())
		case <-t.C:
		}
	}
}

func removeTree(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir)
}

// Mounts implements [Machine].
func (Linux) Mounts() ([]string, error) {
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range infos {
		out = append(out, m.Mountpoint)
	}
	return out, nil
}

// Unmount implements [Machine]. A mount that is busy is detached: nobody finds it any more.
func (Linux) Unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil // it went with another
	}
	return err
}

// Remove implements [Machine].
func (Linux) Remove(pattern string) ([]string, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, f := range files {
		errs = append(errs, os.Remove(f))
	}
	return files, errors.Join(errs...)
}

// RemoveBridge implements [Machine].
func (Linux) RemoveBridge(name string) ([]string, error) {
	bridge, err := netlink.LinkByName(name)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, l := range append(links, bridge) {
		if l.Attrs().MasterIndex != bridge.Attrs().Index && l != bridge {
			continue
		}
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			return names, fmt.Errorf("delete %s: %w", l.Attrs().Name, err)
		}
		names = append(names, l.Attrs().Name)
	}
	return names, nil
}

// Run implements [Machine].
func (Linux) Run(ctx context.Context, input []byte, name string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, fs.ErrNotExist)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = bytes.NewReader(input)
	var errout bytes.Buffer
	cmd.Stderr = &errout
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %.200s", name, err, strings.TrimSpace(errout.String()))
	}
	return out, nil
}
