package image

import (
	"sync/atomic"

	"github.com/hutch-run/hutch/internal/fault"
)

// Limits bounds what one source may cost. Zero fields take the default.
type Limits struct {
	// Entries is the number of tar entries over all layers (default 1 million;
	// an entry costs about 1.2 KiB of memory while building).
	Entries int64
	// UnpackedBytes is the size of all file contents over all layers, whether a
	// later layer hides them or not (default 64 GiB).
	UnpackedBytes int64
	// FileBytes is the size of one file (default 32 GiB, the most: the ext4
	// writer mislays the extents of files from 42 GiB on).
	FileBytes int64
	// Ratio is how many times its stored size a layer may unpack to, looked at
	// once it is past RatioFloor (default 250; real layers stay below 30).
	Ratio int64
	// RatioFloor is the unpacked size up to which the ratio does not matter
	// (default 256 MiB).
	RatioFloor int64
	// Layers is the number of layers (default 512; docker itself stops at 127).
	Layers int
	// PathBytes is the length of a path (default and most 4095, PATH_MAX). A
	// single name is never longer than 255 bytes, the most that ext4 holds.
	PathBytes int
	// XattrBytes is the size of all extended attributes of one entry, names and
	// values (default and most 3500: they share one 4 KiB block).
	XattrBytes int
	// Parallel is the number of layers fetched at once (default 3).
	Parallel int
}

// What the ext4 format and its writer hold, not open to configuration.
const (
	maxName      = 255
	maxPath      = 4095
	maxLinkname  = 4095
	maxXattrs    = 12 // the writer sorts up to 12 of a block right, see xattr.go
	maxXattrSum  = 3500
	maxFileBytes = 32 << 30
	maxLinks     = 65000
	maxID        = 1<<32 - 2 // the last id is "nobody at all" for chown

	maxManifest = 4 << 20 // bytes of a manifest or index
	maxConfig   = 8 << 20 // bytes of an image config
)

func (l Limits) withDefaults() Limits {
	def := func(p *int64, v int64) {
		if *p <= 0 {
			*p = v
		}
	}
	cap32 := func(p *int, v int) {
		if *p <= 0 || *p > v {
			*p = v
		}
	}
	def(&l.Entries, 1_000_000)
	def(&l.UnpackedBytes, 64<<30)
	def(&l.FileBytes, maxFileBytes)
	l.FileBytes = min(l.FileBytes, maxFileBytes)
	def(&l.Ratio, 250)
	def(&l.RatioFloor, 256<<20)
	if l.Layers <= 0 {
		l.Layers = 512
	}
	if l.Parallel <= 0 {
		l.Parallel = 3
	}
	cap32(&l.PathBytes, maxPath)
	cap32(&l.XattrBytes, maxXattrSum)
	return l
}

// budget counts what all layers of one build have used together. It is safe
// for concurrent use.
type budget struct {
	lim     Limits
	entries atomic.Int64
	bytes   atomic.Int64
}

func (b *budget) addEntry() error {
	if b.entries.Add(1) > b.lim.Entries {
		return fault.New(fault.Invalid, "the image has more than %d entries, the limit", b.lim.Entries)
	}
	return nil
}

func (b *budget) addBytes(n int64) error {
	if b.bytes.Add(n) > b.lim.UnpackedBytes {
		return fault.New(fault.Invalid, "the image unpacks to more than %d bytes, the limit", b.lim.UnpackedBytes)
	}
	return nil
}

// giveBack takes out of the account what a layer used that is read again.
func (b *budget) giveBack(entries, bytes int64) {
	b.entries.Add(-entries)
	b.bytes.Add(-bytes)
}
