package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// processes lists processes by argv. Zombies have none and are not listed:
// they are their parent's to reap and hold nothing.
func processes(s Scope) ([]string, error) {
	if len(s.Programs) == 0 {
		return nil, nil
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, dir := range dirs {
		raw, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			if vanished(err) {
				continue
			}
			return nil, err
		}
		argv := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
		line := strings.Join(argv, " ")
		if !hasPrefix(filepath.Base(argv[0]), s.Programs) || !strings.Contains(line, s.ProgramsWith) {
			continue
		}
		found = append(found, fmt.Sprintf("%s: %s", filepath.Base(dir), shorten(line, 300)))
	}
	return found, nil
}

func namespaces(s Scope) ([]string, error) {
	if s.NetnsDir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(s.NetnsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var found []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), s.NetnsPrefix) {
			found = append(found, filepath.Join(s.NetnsDir, e.Name()))
		}
	}
	return found, err
}

func links(s Scope) ([]string, error) {
	if s.LinkPrefix == "" {
		return nil, nil
	}
	all, err := net.Interfaces()
	var found []string
	for _, link := range all {
		if strings.HasPrefix(link.Name, s.LinkPrefix) {
			found = append(found, link.Name)
		}
	}
	return found, err
}

func nftObjects(s Scope) ([]string, error) {
	if s.NFTPrefix == "" {
		return nil, nil
	}
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, table := range tables {
		if !strings.HasPrefix(table.Name, s.NFTPrefix) {
			continue
		}
		inside, err := nftTable(c, table)
		if errors.Is(err, unix.ENOENT) {
			continue // removed while we looked
		}
		if err != nil {
			return nil, fmt.Errorf("table %s: %w", table.Name, err)
		}
		found = append(found, inside...)
	}
	return found, nil
}

// nftTable lists a table, its chains with the number of their rules, its sets
// and their elements.
func nftTable(c *nftables.Conn, table *nftables.Table) ([]string, error) {
	name := fmt.Sprintf("table %s (family %d)", table.Name, table.Family)
	found := []string{name}
	chains, err := c.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return nil, err
	}
	for _, chain := range chains {
		if chain.Table.Name != table.Name {
			continue
		}
		rules, err := c.GetRules(table, chain)
		if err != nil {
			return nil, err
		}
		found = append(found, fmt.Sprintf("%s chain %s with %d rules", name, chain.Name, len(rules)))
	}
	sets, err := c.GetSets(table)
	if err != nil {
		return nil, err
	}
	for _, set := range sets {
		if set.Anonymous {
			continue
		}
		found = append(found, name+" set "+set.Name)
		elements, err := c.GetSetElements(set)
		if err != nil {
			return nil, err
		}
		for _, e := range elements {
			found = append(found, fmt.Sprintf("%s set %s element %x -> %x", name, set.Name, e.Key, e.Val))
		}
	}
	return found, nil
}

func cgroups(s Scope) ([]string, error) {
	var roots []string
	for _, pattern := range s.Cgroups {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("pattern %s: %w", pattern, err)
		}
		roots = append(roots, dirs...)
	}
	return walk(roots, fs.FileMode.IsDir)
}

func mounts(s Scope) ([]string, error) {
	if len(s.Mounts) == 0 {
		return nil, nil
	}
	// Of the thread: the main thread may have been left in another namespace.
	raw, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(raw)) {
		// The places: id parent major:minor root point options ... - type source.
		head, tail, ok := strings.Cut(strings.TrimSpace(line), " - ")
		fields, last := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 5 || len(last) < 2 {
			return nil, fmt.Errorf("mountinfo line not understood: %q", line)
		}
		root, point, source := unescape(fields[3]), unescape(fields[4]), unescape(last[1])
		if hasPrefix(root, s.Mounts) || hasPrefix(point, s.Mounts) || hasPrefix(source, s.Mounts) {
			found = append(found, fmt.Sprintf("%s on %s type %s (root %s)", source, point, last[0], root))
		}
	}
	return found, nil
}

func loops(s Scope) ([]string, error) {
	if s.LoopFiles == "" {
		return nil, nil
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range backing {
		raw, err := os.ReadFile(path)
		if err != nil {
			if vanished(err) {
				continue
			}
			return nil, err
		}
		if file := strings.TrimSpace(string(raw)); strings.HasPrefix(file, s.LoopFiles) {
			found = append(found, fmt.Sprintf("%s of %s", strings.Split(path, "/")[3], file))
		}
	}
	return found, nil
}

func files(s Scope) ([]string, error) {
	return walk(s.Dirs, func(fs.FileMode) bool { return true })
}

// walk lists everything below the roots, themselves not included, whose mode
// is wanted.
func walk(roots []string, want func(fs.FileMode) bool) ([]string, error) {
	var found []string
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				if vanished(err) {
					return nil
				}
				return err
			}
			if path != root && want(d.Type()) {
				found = append(found, fmt.Sprintf("%s (%s)", path, d.Type()))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// vanished reports whether err is that of a thing that went while it was read.
func vanished(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENXIO) ||
		errors.Is(err, unix.ENODEV)
}

func hasPrefix(s string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

func shorten(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
