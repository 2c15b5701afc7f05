package ram

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mapsMax bounds what is read of a process's list of mappings, in bytes. A VMM
// has a few hundred of them; the kernel's own limit is 65530.
const mapsMax = 8 << 20

// Memory is a guest's memory in the process of its VMM.
type Memory struct {
	size  int64
	file  *os.File
	parts []part // in order, without gaps

	// Of a private mapping only.
	own     *os.File // the process's address space
	pagemap *os.File
}

// part is one piece of the mapping.
type part struct {
	inode   string
	private bool
	at, len int64 // in the file
	address int64
}

// Open finds the size bytes of guest memory in the process pid. The caller
// makes sure afterwards that pid is still the process it meant, and closes it.
// A process that ends is a fault.Unavailable.
func Open(pid int, size int64) (*Memory, error) {
	m, err := open(pid, size)
	if err != nil {
		return nil, fmt.Errorf("find memory of process %d: %w", pid, err)
	}
	return m, nil
}

func open(pid int, size int64) (*Memory, error) {
	dir, err := os.Open("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return nil, lost(err)
	}
	defer dir.Close()
	maps, err := openIn(dir, "maps", os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	text, err := io.ReadAll(io.LimitReader(maps, mapsMax))
	if err == nil && len(text) == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, lost(err)
	}
	m, err := find(dir, parseMaps(text), size)
	if err != nil || !m.parts[0].private {
		return m, err
	}
	if m.own, err = openIn(dir, "mem", os.O_RDONLY); err == nil {
		m.pagemap, err = openIn(dir, "pagemap", os.O_RDONLY)
	}
	if err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// Close closes what Open opened.
func (m *Memory) Close() {
	for _, f := range []*os.File{m.file, m.own, m.pagemap} {
		if f != nil {
			f.Close()
		}
	}
}

// parseMaps returns the mappings of memory files, those of one file together
// and in the order of their places in it; see /proc/pid/maps in proc(5).
func parseMaps(text []byte) []part {
	var all []part
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) < 6 || !strings.HasPrefix(f[5], "/memfd:") || len(f[1]) != 4 {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseInt(from, 16, 64)
		end, err2 := strconv.ParseInt(to, 16, 64)
		at, err3 := strconv.ParseInt(f[2], 16, 64)
		if errors.Join(err1, err2, err3) != nil {
			continue
		}
		all = append(all, part{inode: f[3] + " " + f[4], private: f[1][3] == 'p', at: at, len: end - start, address: start})
	}
	slices.SortFunc(all, func(a, b part) int {
		return cmp.Or(strings.Compare(a.inode, b.inode), cmp.Compare(a.at, b.at), cmp.Compare(a.address, b.address))
	})
	return all
}

// find returns the memory among all mappings: the one file of the right size
// that is mapped once and whole.
func find(dir *os.File, all []part, size int64) (*Memory, error) {
	var found *Memory
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].inode == all[0].inode {
			n++
		}
		parts := all[:n]
		all = all[n:]
		if !whole(parts, size) {
			continue
		}
		f, err := openMapped(dir, parts[0], size)
		if err != nil {
			if found != nil {
				found.Close()
			}
			return nil, err
		}
		if f == nil {
			continue
		}
		if found != nil {
			found.Close()
			f.Close()
			return nil, errors.New("it has two that could be it")
		}
		found = &Memory{size: size, file: f, parts: parts}
	}
	if found == nil {
		return nil, fmt.Errorf("no memory file of %d bytes is mapped whole", size)
	}
	return found, nil
}

// whole reports whether parts cover 0 to size once, all in one way.
func whole(parts []part, size int64) bool {
	var end int64
	for _, p := range parts {
		if p.at != end || p.private != parts[0].private {
			return false
		}
		end += p.len
	}
	return end == size
}

// openMapped opens the file of a mapping for reading when it is a memory file
// of size bytes whose size is sealed. Nil: it is another one.
func openMapped(dir *os.File, p part, size int64) (*os.File, error) {
	name := fmt.Sprintf("map_files/%x-%x", p.address, p.address+p.len)
	at, err := openIn(dir, name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if fi, err := at.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() != size {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", at.Fd()))
	if err != nil {
		return nil, err
	}
	if have, err := seals(f, size); err != nil || have&sizeSeals != sizeSeals {
		f.Close()
		return nil, nil
	}
	return f, nil
}

func openIn(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, lost(&os.PathError{Op: "open", Path: dir.Name() + "/" + name, Err: err})
	}
	return os.NewFile(uintptr(fd), name), nil
}
