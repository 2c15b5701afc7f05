package kernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// maxVmlinux bounds an unpacked kernel.
const maxVmlinux = 512 << 20

// Offsets in a bzImage, of the kernel's Documentation/arch/x86/boot.rst.
const (
	setupSectsOffset    = 0x1f1
	headerMagicOffset   = 0x202 // after "HdrS"
	payloadOffset       = 0x248 // relative to the protected-mode code
	payloadLengthOffset = 0x24c
)

// writeKernel writes the kernel of a source to path. A bzImage of a known
// compression is unpacked to the ELF file inside: unpacking is a sixth of a
// boot under emulation, and there is no need to do it each time. Everything
// else is copied as it is; VMMs boot either.
func writeKernel(path, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	if elf, err := unpackKernel(b); err == nil {
		b = elf
	} else if !errors.Is(err, errNotPacked) {
		return fmt.Errorf("unpack kernel %s: %w", from, err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("write kernel: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write kernel: %w", err)
	}
	return nil
}

// errNotPacked says that a file is no bzImage whose payload can be unpacked
// here.
var errNotPacked = errors.New("no packed kernel")

// unpackKernel returns the ELF kernel inside a bzImage.
func unpackKernel(b []byte) ([]byte, error) {
	if len(b) < payloadLengthOffset+4 || string(b[headerMagicOffset:headerMagicOffset+4]) != "HdrS" {
		return nil, errNotPacked
	}
	sectors := int64(b[setupSectsOffset])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(b[payloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(b[payloadLengthOffset:]))
	if start >= end || end > int64(len(b)) || end-start < 8 {
		return nil, errNotPacked
	}
	r, err := payloadReader(b[start:end])
	if err != nil {
		return nil, err
	}
	// The last four bytes are the unpacked size, which some formats take for
	// trailing garbage: what matters is that all of the kernel came before.
	size := binary.LittleEndian.Uint32(b[end-4 : end])
	if size == 0 || size > maxVmlinux {
		return nil, errNotPacked
	}
	out := make([]byte, size)
	if _, err := io.ReadFull(r, out); err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(out, []byte("\x7fELF")) {
		return nil, errNotPacked
	}
	return out, nil
}

// payloadReader chooses the decompressor by the payload's first bytes.
func payloadReader(p []byte) (io.Reader, error) {
	for magic, open := range map[string]func(io.Reader) (io.Reader, error){
		"\x02\x21\x4c\x18": func(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil },
		"\x28\xb5\x2f\xfd": func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r) },
		"\xfd7zXZ\x00":     func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) },
		"\x1f\x8b":         func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
	} {
		if bytes.HasPrefix(p, []byte(magic)) {
			return open(bytes.NewReader(p[:len(p)-4]))
		}
	}
	return nil, errNotPacked
}
