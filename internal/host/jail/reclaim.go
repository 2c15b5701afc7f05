package jail

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Reclaim ends and removes everything below the parent cgroup whose name live
// does not claim, and returns those names. It tries all, and joins the errors.
func (j *Jail) Reclaim(ctx context.Context, live func(name string) bool) ([]string, error) {
	var gone []string
	var errs []error
	for _, parent := range j.groups.parents {
		entries, err := os.ReadDir(parent)
		if err != nil {
			errs = append(errs, fmt.Errorf("list cgroups: %w", err))
			continue
		}
		for _, e := range entries {
			if !e.IsDir() || live(e.Name()) {
				continue
			}
			dir := filepath.Join(parent, e.Name())
			if err := errors.Join(endMembers(dir), rmdir(ctx, dir)); err != nil {
				errs = append(errs, err)
				continue
			}
			gone = append(gone, e.Name())
		}
	}
	slices.Sort(gone)
	return slices.Compact(gone), errors.Join(errs...)
}

// endMembers kills the processes of a cgroup. A pid is looked up again after
// it was opened: only a process that is in the cgroup is ended. No jailed
// program can fork unseen, since its cgroup holds its children too; what
// a fork adds meanwhile is found in the next round.
func endMembers(dir string) error {
	for range 100 {
		pids, err := members(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := endMember(dir, pid); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("end the processes of cgroup %s: they come back", dir)
}

func endMember(dir string, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	now, err := members(dir)
	if err != nil || !slices.Contains(now, pid) {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("end process %d: %w", pid, err)
		case n == 0:
			return fmt.Errorf("end process %d: it does not end", pid)
		default:
			return nil
		}
	}
}

// Close removes the parent cgroup when it is empty. It is for tests and for
// taking hutch off a host.
func (j *Jail) Close() error {
	var errs []error
	for _, parent := range j.groups.parents {
		if err := unix.Rmdir(parent); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", parent, err))
		}
	}
	return errors.Join(errs...)
}
