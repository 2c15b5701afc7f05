package power

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Trimmed is what one Trim gave back.
type Trimmed struct {
	// Disks has one entry for each device, in the order of the mounts.
	Disks []TrimmedDisk
}

// TrimmedDisk is one device of a Trimmed.
type TrimmedDisk struct {
	Point string // where the filesystem is mounted
	Bytes uint64
	// Err is why it was not trimmed; nil: it was.
	Err error
}

// Total returns the bytes given back over all devices.
func (t Trimmed) Total() uint64 {
	var sum uint64
	for _, d := range t.Disks {
		sum += d.Bytes
	}
	return sum
}

// String tells the result in words, a part for each device.
func (t Trimmed) String() string {
	if len(t.Disks) == 0 {
		return "no writable filesystem on a disk"
	}
	parts := make([]string, 0, len(t.Disks))
	for _, d := range t.Disks {
		switch {
		case d.Err == nil:
			parts = append(parts, fmt.Sprintf("%s: %d bytes", d.Point, d.Bytes))
		case errors.Is(d.Err, unix.EOPNOTSUPP) || errors.Is(d.Err, unix.ENOTTY):
			parts = append(parts, fmt.Sprintf("%s: its filesystem or disk can't discard", d.Point))
		default:
			parts = append(parts, fmt.Sprintf("%s: %v", d.Point, d.Err))
		}
	}
	return strings.Join(parts, "; ")
}

// Trim gives the unused blocks of every writable filesystem on a disk back,
// once for each device however often it is mounted. A device that can't do it
// is told in the result and is no error. Calls wait for one another; ctx is
// looked at between devices.
func (p *Power) Trim(ctx context.Context) (Trimmed, error) {
	select {
	case p.trimming <- struct{}{}:
	case <-ctx.Done():
		return Trimmed{}, fmt.Errorf("wait for another trim: %w", ctx.Err())
	}
	defer func() { <-p.trimming }()
	mounts, err := p.kernel.Mounts()
	if err != nil {
		return Trimmed{}, fmt.Errorf("list mounts: %w", err)
	}
	var t Trimmed
	for _, views := range devices(mounts) {
		if err := ctx.Err(); err != nil {
			return t, fmt.Errorf("trim disks: %w", err)
		}
		t.Disks = append(t.Disks, p.trimDevice(views))
	}
	return t, nil
}

// trimDevice trims one device through the first of its mounts that is not
// hidden by another.
func (p *Power) trimDevice(views []Mount) TrimmedDisk {
	var last TrimmedDisk
	for _, m := range views {
		n, err := p.kernel.Trim(m)
		last = TrimmedDisk{Point: m.Point, Bytes: n, Err: err}
		if !errors.Is(err, errCovered) {
			break
		}
	}
	return last
}

// devices returns the mounts of writable filesystems on disks by device, in
// the order of their first mount.
func devices(mounts []Mount) [][]Mount {
	index := map[string]int{}
	var found [][]Mount
	for _, m := range mounts {
		if m.ReadOnly || !m.OnDisk() {
			continue
		}
		key := fmt.Sprintf("%d:%d", m.Major, m.Minor)
		if m.Major == 0 {
			key = m.Source
		}
		i, ok := index[key]
		if !ok {
			i = len(found)
			index[key] = i
			found = append(found, nil)
		}
		found[i] = append(found[i], m)
	}
	return found
}
