package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxWindow bounds the history that a compressed stream may make its reader
// keep: 128 MiB, what the zstd tool itself accepts and twice what xz -9 writes.
const maxWindow = 128 << 20

// compression is how a stream is packed, told by its first bytes: what media
// types and file names say about it is wrong too often.
type compression string

const (
	plain   compression = "none"
	gzipped compression = "gzip"
	zstded  compression = "zstd"
	xzed    compression = "xz"
)

func sniff(head []byte) compression {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzipped
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(head) >= 4 && binary.LittleEndian.Uint32(head)&0xfffffff0 == 0x184d2a50: // a skippable frame first
		return zstded
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return xzed
	}
	return plain
}

// decompress returns the unpacked stream of br and how it was packed. Garbage
// behind a compressed stream is an error of the stream. close frees what the
// reader holds.
func decompress(br *bufio.Reader) (r io.Reader, c compression, closeFn func(), err error) {
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, plain, nil, err
	}
	nop := func() {}
	switch c = sniff(head); c {
	case gzipped:
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, c, nil, streamError(err)
		}
		return zr, c, func() { _ = zr.Close() }, nil
	case zstded:
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, c, nil, streamError(err)
		}
		return zr, c, zr.Close, nil
	case xzed:
		if dict := xzDict(head); dict > maxWindow {
			return nil, c, nil, fault.New(fault.Invalid, "the xz stream wants a dictionary of %d bytes, the limit is %d", dict, maxWindow)
		}
		zr, err := xz.NewReader(br)
		if err != nil {
			return nil, c, nil, streamError(err)
		}
		return zr, c, nop, nil
	}
	return br, plain, nop, nil
}

// xzDict reads the dictionary size that the first block of an xz stream asks
// for, 0 when it cannot be told (the xz reader then says what is wrong). The
// format: xz-file-format.txt, parts 2.1, 3.1 and 5.3.1.
func xzDict(head []byte) int64 {
	const streamHeader, lzma2 = 12, 0x21
	if len(head) < streamHeader+4 {
		return 0
	}
	b := head[streamHeader+1:]
	flags := b[0]
	b = b[1:]
	skip := func() bool {
		_, n := binary.Uvarint(b)
		if n <= 0 {
			return false
		}
		b = b[n:]
		return true
	}
	for _, bit := range []byte{0x40, 0x80} { // the optional sizes
		if flags&bit != 0 && !skip() {
			return 0
		}
	}
	for range flags&3 + 1 {
		id, n := binary.Uvarint(b)
		if n <= 0 {
			return 0
		}
		b = b[n:]
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return 0
		}
		props := b[n : n+int(size)]
		b = b[n+int(size):]
		if id == lzma2 && len(props) == 1 {
			bits := int64(props[0] & 0x3f)
			return (2 | bits&1) << (bits/2 + 11)
		}
	}
	return 0
}

// streamError makes an error of a decompressor a refusal of the input, unless
// it is none of its own making.
func streamError(err error) error {
	var f *fault.Error
	var src *sourceError
	switch {
	case errors.As(err, &f), errors.As(err, &src): // ahead of what they may wrap
		return err
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fault.New(fault.Invalid, "the stream is cut short")
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fault.New(fault.Invalid, "the zstd stream wants a window of more than %d bytes", maxWindow)
	}
	return fault.New(fault.Invalid, "the stream is damaged or has something behind its end: %v", err)
}
