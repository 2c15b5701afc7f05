package supervise

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func (u *unit) cgroup() string { return filepath.Join(u.s.p.Cgroups, u.def.Name) }

// openCgroup makes the unit's cgroup and opens it.
func (u *unit) openCgroup() (int, error) {
	if err := u.s.makeParent(); err != nil {
		return -1, err
	}
	dir := u.cgroup()
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return -1, fmt.Errorf("make cgroup: %w", err)
	}
	if u.def.MemoryMin > 0 {
		u.s.protect(dir, u.def.MemoryMin)
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open cgroup %s: %w", dir, err)
	}
	return fd, nil
}

// makeParent makes the cgroup of all units, protected by the sum of them: what
// a parent does not have, its children don't either.
func (s *Supervisor) makeParent() error {
	if err := os.MkdirAll(s.p.Cgroups, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	b, err := os.ReadFile(filepath.Join(s.p.Cgroups, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("look at cgroup %s: %w", s.p.Cgroups, err)
	}
	for _, c := range strings.Fields(string(b)) {
		if err := os.WriteFile(filepath.Join(s.p.Cgroups, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			s.p.Log.Warn("hand a controller down to services", "controller", c, "error", err)
		}
	}
	var sum int64
	s.mu.Lock()
	for _, u := range s.units {
		sum += u.def.MemoryMin
	}
	s.mu.Unlock()
	if sum > 0 {
		s.protect(s.p.Cgroups, sum)
	}
	return nil
}

// protect leaves memory to a cgroup. Without the controller there is nothing to
// protect it with, and the services run all the same.
func (s *Supervisor) protect(dir string, bytes int64) {
	file := filepath.Join(dir, "memory.min")
	err := os.WriteFile(file, []byte(strconv.FormatInt(bytes, 10)), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		s.p.Log.Warn("protect the memory of services", "file", file, "error", err)
	}
}

// killRest kills all that is left in the unit's cgroup.
func (u *unit) killRest() {
	err := os.WriteFile(filepath.Join(u.cgroup(), "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.s.p.Log.Warn("kill what a service left", "service", u.def.Name, "error", err)
	}
}
