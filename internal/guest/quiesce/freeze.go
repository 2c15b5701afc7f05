package quiesce

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxRounds bounds the looks for groups that came up meanwhile. What is not
// frozen yet can make some; what stands outside of all groups, for ever.
const maxRounds = 4

// freezer stops the cgroups at the top of a tree.
type freezer struct {
	root   string
	spare  string
	limit  time.Duration              // for a group to stand still
	note   func(names []string) error // told of every group before it is stopped
	frozen []string                   // names of those stopped here
}

// freeze stops all groups but spare and those that others have frozen, and
// returns when they stand still.
func (f *freezer) freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, f.limit, fault.New(fault.Unavailable, "they do not stand still after %v", f.limit))
	defer cancel()
	for range maxRounds {
		moving, err := f.moving()
		if err != nil {
			return err
		}
		if err := f.stop(moving); err != nil {
			return err
		}
		if err := f.await(ctx); err != nil {
			return err
		}
		if len(moving) == 0 {
			return nil
		}
	}
	return fault.New(fault.Unavailable, "new cgroups come up in %s all the time", f.root)
}

// moving lists the groups that nobody has stopped.
func (f *freezer) moving() ([]string, error) {
	entries, err := os.ReadDir(f.root)
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	var names []string
	for _, e := range entries {
		if !e.IsDir() || e.Name() == f.spare {
			continue
		}
		value, err := os.ReadFile(f.file(e.Name(), "cgroup.freeze"))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV): // the group has gone
		case err != nil:
			return nil, err
		case strings.TrimSpace(string(value)) == "0":
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (f *freezer) stop(names []string) error {
	if len(names) == 0 {
		return nil
	}
	for _, n := range names {
		if !slices.Contains(f.frozen, n) {
			f.frozen = append(f.frozen, n)
		}
	}
	if err := f.note(f.frozen); err != nil {
		return err
	}
	for _, n := range names {
		if err := f.write(n, "1"); err != nil {
			return err
		}
	}
	return nil
}

// thaw lets the groups go on. Those that it could not reach stay noted.
func (f *freezer) thaw() error {
	var errs []error
	f.frozen = slices.DeleteFunc(f.frozen, func(n string) bool {
		err := f.write(n, "0")
		errs = append(errs, err)
		return err == nil
	})
	return errors.Join(errs...)
}

// write sets the state that a group should have; one that has gone needs none.
//
// It takes the shortest way: copies of the guest wait for it.
func (f *freezer) write(name, value string) error {
	path := f.file(name, "cgroup.freeze")
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte(value))
	}
	switch err {
	case nil, unix.ENOENT, unix.ENODEV:
		return nil
	}
	return &fs.PathError{Op: "write", Path: path, Err: err}
}

// await waits until all that was stopped stands still.
func (f *freezer) await(ctx context.Context) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch cgroups: %w", err)
	}
	watch := os.NewFile(uintptr(fd), "inotify")
	defer watch.Close()
	defer context.AfterFunc(ctx, func() { _ = watch.SetReadDeadline(time.Unix(1, 0)) })()
	for _, n := range f.frozen {
		if _, err := unix.InotifyAddWatch(fd, f.file(n, "cgroup.events"), unix.IN_MODIFY); err != nil && err != unix.ENOENT {
			return fmt.Errorf("watch cgroup %s: %w", n, err)
		}
	}
	buf := make([]byte, 4<<10)
	for {
		left, err := f.restless()
		if err != nil || left == "" {
			return err
		}
		if _, err := watch.Read(buf); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("cgroup %s: %w", left, err)
		}
	}
}

// restless returns a group in which something still moves, or "".
func (f *freezer) restless() (string, error) {
	for _, n := range f.frozen {
		events, err := os.ReadFile(f.file(n, "cgroup.events"))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		case err != nil:
			return "", err
		case !strings.Contains(string(events), "frozen 1"):
			return n, nil
		}
	}
	return "", nil
}

func (f *freezer) file(name, file string) string { return filepath.Join(f.root, name, file) }
