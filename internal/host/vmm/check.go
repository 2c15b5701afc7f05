package vmm

import (
	"net"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// Bounds of a machine.
const (
	MaxVCPUs    = 64
	MinMemoryMB = 64
	MaxMemoryMB = 1 << 20
	maxDisks    = 16
	maxSerial   = 20 // bytes, by the virtio specification
	maxShares   = 16
	maxTag      = 36 // bytes, by the virtio specification
	// maxCmdline is what the kernel takes on x86 (2048 with its final zero
	// byte), less room for what a driver adds.
	maxCmdline = 1900
	// maxDir is sizeof sockaddr_un.sun_path less its final zero byte, a slash
	// and room for MaxSocketName.
	maxDir = 107 - 1 - MaxSocketName
)

// MaxSocketName is the longest name, in bytes, that a driver may give a socket
// in Spec.Dir.
const MaxSocketName = 16

// Check refuses a spec that no VMM should ever see, as an invalid field. It
// looks at values only, never at files. Every driver calls it first.
func (s Spec) Check() error {
	if _, err := sandbox.ParseID(string(s.ID)); err != nil {
		return fault.BadField("id", "%v", err)
	}
	switch {
	case s.VCPUs < 1 || s.VCPUs > MaxVCPUs:
		return fault.BadField("vcpus", "%d is not within 1 to %d", s.VCPUs, MaxVCPUs)
	case s.MemoryMB < MinMemoryMB || s.MemoryMB > MaxMemoryMB:
		return fault.BadField("memory_mb", "%d is not within %d to %d", s.MemoryMB, MinMemoryMB, MaxMemoryMB)
	case s.UID <= 0:
		return fault.BadField("uid", "%d is not an unprivileged user", s.UID)
	case len(s.Disks) > maxDisks:
		return fault.BadField("disks", "%d are more than %d", len(s.Disks), maxDisks)
	}
	if err := checkCmdline(s.Cmdline); err != nil {
		return err
	}
	if err := checkPaths(s); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, d := range s.Disks {
		if len(d.Serial) > maxSerial || !regexp.MustCompile(`^[A-Za-z0-9_-]+$`).MatchString(d.Serial) {
			return fault.BadField("disks", "serial %q is not 1 to %d letters, digits, dashes and underscores", d.Serial, maxSerial)
		}
		if !filepath.IsAbs(d.Path) {
			return fault.BadField("disks", "%q is not an absolute path", d.Path)
		}
		if seen[d.Serial] {
			return fault.BadField("disks", "serial %q is given twice", d.Serial)
		}
		seen[d.Serial] = true
	}
	if err := checkShares(s.Shares); err != nil {
		return err
	}
	return checkNIC(s.NIC)
}

func checkShares(shares []Share) error {
	if len(shares) > maxShares {
		return fault.BadField("shares", "%d are more than %d", len(shares), maxShares)
	}
	seen := map[string]bool{}
	for _, s := range shares {
		switch {
		case len(s.Tag) > maxTag || !regexp.MustCompile(`^[A-Za-z0-9_-]+$`).MatchString(s.Tag):
			return fault.BadField("shares", "tag %q is not 1 to %d letters, digits, dashes and underscores", s.Tag, maxTag)
		case seen[s.Tag]:
			return fault.BadField("shares", "tag %q is given twice", s.Tag)
		case s.Conn == nil:
			return fault.BadField("shares", "%s has no connection", s.Tag)
		}
		seen[s.Tag] = true
	}
	return nil
}

func checkCmdline(s string) error {
	if len(s) > maxCmdline {
		return fault.BadField("cmdline", "it has %d bytes, there is room for %d", len(s), maxCmdline)
	}
	if i := strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }); i >= 0 {
		return fault.BadField("cmdline", "byte %d is not printable ASCII", i)
	}
	return nil
}

// CheckAdopted is Check for the part of a spec that Adopt uses: the id, the
// directory and the logs.
func (s Spec) CheckAdopted() error {
	if _, err := sandbox.ParseID(string(s.ID)); err != nil {
		return fault.BadField("id", "%v", err)
	}
	return checkDirs(s, map[string]string{})
}

func checkPaths(s Spec) error {
	paths := map[string]string{"kernel": s.Kernel}
	if s.Initrd != "" {
		paths["initrd"] = s.Initrd
	}
	if s.Netns != "" {
		paths["netns"] = s.Netns
	}
	return checkDirs(s, paths)
}

func checkDirs(s Spec, paths map[string]string) error {
	paths["dir"], paths["console_log"], paths["vmm_log"] = s.Dir, s.ConsoleLog, s.VMMLog
	for field, p := range paths {
		if !filepath.IsAbs(p) {
			return fault.BadField(field, "%q is not an absolute path", p)
		}
	}
	if len(s.Dir) > maxDir {
		return fault.BadField("dir", "sockets do not fit into %s: it has %d bytes, there is room for %d: use a run directory with a shorter path", s.Dir, len(s.Dir), maxDir)
	}
	return nil
}

func checkNIC(n *NIC) error {
	if n == nil {
		return nil
	}
	if n.Tap == nil {
		return fault.BadField("nic", "there is no tap")
	}
	mac, err := net.ParseMAC(n.MAC)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac.String() != strings.ToLower(n.MAC) {
		return fault.BadField("nic", "%q is no MAC address of one interface, such as 02:00:00:00:00:01", n.MAC)
	}
	return nil
}
