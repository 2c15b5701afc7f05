package account

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of what is read from the account files. Real ones are far smaller;
// lines beyond the limit are skipped, bytes beyond it not read.
const (
	maxFileBytes = 4 << 20
	maxLineBytes = 64 << 10
	maxGroups    = 65536 // NGROUPS_MAX of Linux
)

// Files reads users and groups from the account files below a root directory.
// It keeps nothing: every call sees the files as they are.
type Files struct {
	root string
}

// NewFiles returns the accounts of the tree at root, "/" for the system's own.
func NewFiles(root string) *Files { return &Files{root: root} }

// UnknownUserError says that the guest has no such user or group.
type UnknownUserError struct {
	// Kind is "user" or "group".
	Kind string
	Name string
}

// Error tells what was asked for and where it was looked for.
func (e *UnknownUserError) Error() string {
	file := "/etc/passwd"
	if e.Kind == "group" {
		file = "/etc/group"
	}
	return fmt.Sprintf("unknown %s %q: no such entry in the guest's %s", e.Kind, e.Name, file)
}

type passwdEntry struct {
	name        string
	uid, gid    uint32
	home, shell string
}

type groupEntry struct {
	name    string
	gid     uint32
	members string
}

// Lookup finds the user that spec names: "name", "uid", or either with
// ":group" or ":gid" behind it, as in a Dockerfile's USER. A numeric uid needs
// no entry; it then has group 0 and home "/". With an explicit group there are
// no supplementary groups. Root is known even without account files.
func (f *Files) Lookup(spec string) (User, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	if name == "" || len(spec) > 256 || (hasGroup && group == "") {
		return User{}, fmt.Errorf("bad user %q: want a name or uid, and optionally :group", spec)
	}
	u, err := f.findUser(name)
	if err != nil {
		return User{}, err
	}
	if hasGroup {
		gid, err := f.findGroup(group)
		if err != nil {
			return User{}, err
		}
		u.GID = gid
		return u, nil
	}
	if u.Name == "" {
		return u, nil
	}
	u.Groups, err = f.groupsOf(u)
	return u, err
}

func (f *Files) findUser(name string) (User, error) {
	uid, numeric := parseID(name)
	var byName, byID *passwdEntry
	err := f.eachUser(func(e passwdEntry) bool {
		if e.name == name {
			byName = &e
			return false
		}
		if numeric && e.uid == uid && byID == nil {
			byID = &e
		}
		return true
	})
	if err != nil {
		return User{}, err
	}
	found := byName
	if found == nil {
		found = byID
	}
	switch {
	case found != nil:
		return User{Name: found.name, UID: found.uid, GID: found.gid, Home: orDefault(found.home, "/"), Shell: orDefault(found.shell, "/bin/sh")}, nil
	case name == "root" || (numeric && uid == 0):
		return User{Name: "root", Home: "/root", Shell: "/bin/sh"}, nil
	case numeric:
		return User{UID: uid, Home: "/", Shell: "/bin/sh"}, nil
	}
	return User{}, &UnknownUserError{Kind: "user", Name: name}
}

func (f *Files) findGroup(name string) (uint32, error) {
	var gid uint32
	found := false
	err := f.eachGroup(func(e groupEntry) bool {
		if e.name == name {
			gid, found = e.gid, true
		}
		return !found
	})
	if err != nil {
		return 0, err
	}
	if found {
		return gid, nil
	}
	if id, ok := parseID(name); ok {
		return id, nil
	}
	return 0, &UnknownUserError{Kind: "group", Name: name}
}

func (f *Files) groupsOf(u User) ([]uint32, error) {
	var gids []uint32
	err := f.eachGroup(func(e groupEntry) bool {
		if e.gid != u.GID && hasMember(e.members, u.Name) {
			gids = append(gids, e.gid)
		}
		return len(gids) < maxGroups
	})
	slices.Sort(gids)
	return slices.Compact(gids), err
}

func hasMember(list, name string) bool {
	for m := range strings.SplitSeq(list, ",") {
		if strings.TrimSpace(m) == name {
			return true
		}
	}
	return false
}

// Names maps ids to names, read once, for listings.
type Names struct {
	users, groups map[uint32]string
}

// Names reads all names. Unreadable files give an empty table: a listing shows
// numbers then.
func (f *Files) Names() *Names {
	n := &Names{users: map[uint32]string{}, groups: map[uint32]string{}}
	_ = f.eachUser(func(e passwdEntry) bool {
		if _, dup := n.users[e.uid]; !dup {
			n.users[e.uid] = e.name
		}
		return true
	})
	_ = f.eachGroup(func(e groupEntry) bool {
		if _, dup := n.groups[e.gid]; !dup {
			n.groups[e.gid] = e.name
		}
		return true
	})
	return n
}

// User returns the name of uid, or its number.
func (n *Names) User(uid uint32) string { return nameOr(n.users, uid) }

// Group returns the name of gid, or its number.
func (n *Names) Group(gid uint32) string { return nameOr(n.groups, gid) }

func nameOr(m map[uint32]string, id uint32) string {
	if name, ok := m[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

func (f *Files) eachUser(visit func(passwdEntry) bool) error {
	return f.eachLine("etc/passwd", func(line string) bool {
		p := strings.Split(line, ":")
		if len(p) < 7 || p[0] == "" {
			return true
		}
		uid, ok1 := parseID(p[2])
		gid, ok2 := parseID(p[3])
		if !ok1 || !ok2 {
			return true
		}
		return visit(passwdEntry{name: p[0], uid: uid, gid: gid, home: p[5], shell: p[6]})
	})
}

func (f *Files) eachGroup(visit func(groupEntry) bool) error {
	return f.eachLine("etc/group", func(line string) bool {
		p := strings.Split(line, ":")
		if len(p) < 4 || p[0] == "" {
			return true
		}
		gid, ok := parseID(p[2])
		if !ok {
			return true
		}
		return visit(groupEntry{name: p[0], gid: gid, members: p[3]})
	})
}

func (f *Files) eachLine(name string, visit func(string) bool) error {
	path := filepath.Join(f.root, name)
	// O_NONBLOCK, because the guest may have put a fifo there.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read accounts: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return fmt.Errorf("read accounts: %s is not a regular file", path)
	}
	buffer := min(max(int(info.Size())+1, 512), maxLineBytes) // also the longest line
	r := bufio.NewReaderSize(io.LimitReader(file, maxFileBytes), buffer)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			if err := skipLine(r); err != nil {
				return nil
			}
			continue
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) > 0 && line[0] != '#' && !visit(string(line)) {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
	}
}

func skipLine(r *bufio.Reader) error {
	for {
		_, err := r.ReadSlice('\n')
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

// parseID accepts what the kernel does: 32 bits, less the value that means
// "no change".
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != 1<<32-1
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}
