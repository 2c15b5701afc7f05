package identity

import (
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/guest/rootfs"
)

const (
	// marker is the first line of files that hutch may write again.
	marker = "# Written by hutch at each start. Remove this line to keep your changes."
	// maxFile bounds what is read of one file, in bytes.
	maxFile = 64 << 10
)

// content is what was found at a path, and what it means for us.
type content struct {
	text string
	// plain: a regular file by itself, no symlink on the way to it.
	plain bool
	// foreign: it says something that is not ours.
	foreign bool
	st      syscall.Stat_t // from before it was read
}

// writeFiles brings the files in /etc up to date.
func (i *Identity) writeFiles(c Config, p plan, warn func(error)) {
	put := func(name, text string, mode uint32, write func(name, text string, mode uint32) error) {
		if !c.Still || !i.rewrite(name, text, mode) {
			warn(write(name, text, mode))
		}
	}
	if c.ID != "" {
		put("hostname", c.ID+"\n", 0o644, i.write)
		put("hosts", hosts(c.ID, p.link.Address), 0o644, i.writeOurs)
	}
	if c.MachineID != "" {
		put("machine-id", c.MachineID+"\n", 0o444, i.write)
	}
	put("resolv.conf", resolvConf(p.dns), 0o644, i.writeOurs)
}

func hosts(name string, address netip.Prefix) string {
	own := "127.0.1.1" // what Debian gives a machine without an address
	if address.IsValid() {
		own = address.Addr().String()
	}
	return marker + "\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" + own + "\t" + name + "\n"
}

func resolvConf(servers []netip.Addr) string {
	var b strings.Builder
	b.WriteString(marker + "\n")
	for _, s := range servers {
		b.WriteString("nameserver " + s.String() + "\n")
	}
	return b.String()
}

// writeOurs writes a file unless it holds what somebody else has to say.
func (i *Identity) writeOurs(name, text string, mode uint32) error {
	found, err := i.read(name)
	if err == nil && found.foreign {
		i.made[name] = made{dev: found.st.Dev, ino: found.st.Ino, changed: unix.Timespec(found.st.Ctim), foreign: true}
	}
	if err != nil || found.foreign {
		return err
	}
	return i.write(name, text, mode)
}

// write makes /etc/name a file with that text, by a rename, so that a symlink
// there is replaced and never followed. It does nothing when all is as it
// should be. The file is not synced: the next boot writes it again.
func (i *Identity) write(name, text string, mode uint32) error {
	if found, err := i.read(name); err == nil && found.plain && found.text == text {
		return nil
	}
	etc, err := i.openEtc()
	if err != nil {
		return err
	}
	defer unix.Close(etc)
	temporary := ".hutch-" + name
	st, err := create(etc, temporary, text, mode)
	if err != nil {
		return err
	}
	if err := unix.Renameat(etc, temporary, etc, name); err != nil {
		_ = unix.Unlinkat(etc, temporary, 0) // the first error tells more
		return &fs.PathError{Op: "write", Path: "/etc/" + name, Err: err}
	}
	i.made[name] = made{dev: st.Dev, ino: st.Ino, text: text}
	return nil
}

// openEtc opens /etc, and makes it where an image has none.
func (i *Identity) openEtc() (int, error) {
	dir := filepath.Join(i.p.Root, "etc")
	for first := true; ; first = false {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			return fd, nil
		}
		if !first || err != unix.ENOENT {
			return -1, &fs.PathError{Op: "open", Path: dir, Err: err}
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return -1, err
		}
	}
}

// create writes a new file in dir. One of that name is left behind by a crash,
// and goes.
func create(dir int, name, text string, mode uint32) (st unix.Stat_t, err error) {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags, mode)
	if err == unix.EEXIST && unix.Unlinkat(dir, name, 0) == nil {
		fd, err = unix.Openat(dir, name, flags, mode)
	}
	if err != nil {
		return st, &fs.PathError{Op: "create", Path: "/etc/" + name, Err: err}
	}
	f := os.NewFile(uintptr(fd), "/etc/"+name)
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Chmod(fs.FileMode(mode)), unix.Fstat(fd, &st), f.Close()) // Chmod: whatever the umask is
	if err != nil {
		_ = unix.Unlinkat(dir, name, 0)
	}
	return st, err
}

// read returns what the guest sees at /etc/name. Missing, blank and dangling
// are all the same: nothing is said there.
func (i *Identity) read(name string) (content, error) {
	path := "/etc/" + name
	f, err := rootfs.Open(i.p.Root, path)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ELOOP):
		return content{}, nil
	case err != nil:
		return content{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return content{foreign: true}, err
	}
	found := content{st: *fi.Sys().(*syscall.Stat_t)}
	raw, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return content{}, err
	}
	found.text = string(raw)
	found.foreign = strings.TrimSpace(found.text) != "" && !strings.HasPrefix(found.text, marker+"\n")
	if fi, err := os.Lstat(filepath.Join(i.p.Root, path)); err == nil {
		found.plain = fi.Mode().IsRegular()
	}
	return found, nil
}

// readBootID returns the id of this boot.
func readBootID(root string) (string, error) {
	f, err := rootfs.Open(root, bootIDPath)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: bootIDPath, Err: err}
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(raw)), nil
}
