package power

import (
	"fmt"
	"strconv"
	"strings"
)

// Mount is one line of mountinfo.
type Mount struct {
	Major, Minor uint32
	Point        string // where, from the root of this process
	Type         string
	Source       string // "/dev/vdb", or a name without meaning
	// ReadOnly is about the filesystem itself, not about this view of it.
	ReadOnly bool
}

// OnDisk reports whether the filesystem keeps its data on a block device.
// Those with a device number of their own making (btrfs) name it as the source.
func (m Mount) OnDisk() bool { return m.Major != 0 || strings.HasPrefix(m.Source, "/dev/") }

// writable reports whether m holds data that a shutdown must bring to rest.
// An overlay has none of its own, but writes to other filesystems.
func (m Mount) writable() bool {
	return !m.ReadOnly && (m.OnDisk() || m.Type == "overlay")
}

// served reports whether m is the host's own, which it serves to this machine.
func (m Mount) served() bool { return m.Type == "virtiofs" }

// parseMounts reads the format of /proc/<pid>/mountinfo, see proc(5).
func parseMounts(mountinfo string) ([]Mount, error) {
	var mounts []Mount
	for line := range strings.Lines(mountinfo) {
		head, tail, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		fields, super := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 6 || len(super) < 2 {
			return nil, fmt.Errorf("mountinfo line not understood: %q", line)
		}
		major, minor, ok := device(fields[2])
		if !ok {
			return nil, fmt.Errorf("mountinfo line without a device: %q", line)
		}
		m := Mount{Major: major, Minor: minor, Point: unescape(fields[4]), Type: super[0], Source: unescape(super[1])}
		for option := range strings.SplitSeq(super[len(super)-1], ",") {
			m.ReadOnly = m.ReadOnly || option == "ro"
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

func device(s string) (major, minor uint32, ok bool) {
	a, b, ok := strings.Cut(s, ":")
	x, err := strconv.ParseUint(a, 10, 32)
	y, err2 := strconv.ParseUint(b, 10, 32)
	return uint32(x), uint32(y), ok && err == nil && err2 == nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
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
