package link

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cespare/xxhash/v2"
)

// PortName is the name of the virtio-serial port that carries the link, as the
// VMM is told and as the guest finds it.
const PortName = "hutch.link"

// The versions of the protocol behind the handshake that this build speaks.
// The handshake itself never changes its layout.
const (
	MinVersion = 1
	MaxVersion = 2
)

// Limits of the wire.
const (
	// MaxStreams bounds the streams of one session, those that are closed and
	// still have bytes to deliver included.
	MaxStreams = 512
	// Window is how many bytes of a stream each side takes before they are
	// read.
	Window = 128 << 10

	headerLen    = 24
	trailerLen   = 4
	maxFrame     = 32 << 10
	maxPayload   = maxFrame - headerLen - trailerLen
	maxHandshake = 1 << 10 // payload of a handshake frame
	maxWindow    = 16 << 20
	minWindow    = 4 << 10
	sendBuffer   = 64 << 10
	ioBuffer     = 64 << 10
	layout       = 1
)

// Frame types. Those below typeUp belong to the handshake and carry no tag.
const (
	typeHello  = 1
	typeAck    = 2
	typeGo     = 3
	typeReady  = 4
	typeRefuse = 5

	typeUp     = 16
	typeOpen   = 17
	typeStatus = 18
	typeData   = 19
	typeWindow = 20
	typeFin    = 21
	typeStop   = 22
	typeReset  = 23
)

func magic() [4]byte { return [4]byte{0xd1, 0x68, 0x4c, 0x6b} }

// checksum is the low half of XXH64. It tells a frame that was cut from a whole
// one. CRCs are out: their instructions are what emulation is slowest at.
func checksum(b []byte) uint32 { return uint32(xxhash.Sum64(b)) }

// frame is one frame. Its payload is valid until the next read from the reader
// that returned it.
type frame struct {
	typ     uint8
	stream  uint32
	tag     uint64
	payload []byte
}

func (f frame) handshake() bool { return f.typ < typeUp }

// appendFrame appends f to dst. Its payload must not exceed maxPayload.
func appendFrame(dst []byte, f frame) []byte {
	start := len(dst)
	m := magic()
	dst = append(dst, m[:]...)
	dst = append(dst, layout, f.typ)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(f.payload)))
	dst = binary.BigEndian.AppendUint32(dst, f.stream)
	dst = binary.BigEndian.AppendUint64(dst, f.tag)
	dst = binary.BigEndian.AppendUint32(dst, checksum(dst[start:]))
	if len(f.payload) == 0 {
		return dst
	}
	dst = append(dst, f.payload...)
	return binary.BigEndian.AppendUint32(dst, checksum(f.payload))
}

// parseHeader reads the header at the start of b, which holds headerLen bytes,
// and returns the frame without its payload, and the payload's length.
func parseHeader(b []byte) (frame, int, bool) {
	m := magic()
	if !bytes.Equal(b[:4], m[:]) || b[4] != layout ||
		binary.BigEndian.Uint32(b[20:]) != checksum(b[:20]) {
		return frame{}, 0, false
	}
	n := int(binary.BigEndian.Uint16(b[6:]))
	f := frame{typ: b[5], stream: binary.BigEndian.Uint32(b[8:]), tag: binary.BigEndian.Uint64(b[12:])}
	switch {
	case n > maxPayload:
		return frame{}, 0, false
	case f.handshake() && (n > maxHandshake || f.tag != 0 || f.stream != 0):
		return frame{}, 0, false
	}
	return f, n, true
}

// errFraming says that the borders of the frames are lost.
var errFraming = errors.New("frame is cut or damaged")

// frameReader cuts a byte stream into frames. Errors of the stream beneath are
// passed on and leave the reader usable: what was read before them is kept.
type frameReader struct {
	br      *bufio.Reader
	used    int    // bytes of the frame returned last
	skipped uint64 // bytes dropped while hunting
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{br: bufio.NewReaderSize(r, ioBuffer)}
}

// release gives up the frame returned last.
func (r *frameReader) release() {
	r.drop(r.used)
	r.used = 0
}

// drop discards n buffered bytes; that can't fail.
func (r *frameReader) drop(n int) { _, _ = r.br.Discard(n) }

// next returns the next frame, of which the border is known to be here. It
// returns errFraming when there is none; the reader then hunts.
func (r *frameReader) next() (frame, error) {
	r.release()
	if err := r.skipPadding(); err != nil {
		return frame{}, err
	}
	h, err := r.br.Peek(headerLen)
	if err != nil {
		return frame{}, err
	}
	f, n, ok := parseHeader(h)
	if !ok {
		return frame{}, errFraming
	}
	whole, ok, err := r.body(n)
	if err != nil {
		return frame{}, err
	}
	if !ok {
		// What is cut is completed by padding, so all of it goes: a look into
		// the payload could find a handshake that a user wrote.
		r.drop(whole)
		return frame{}, errFraming
	}
	return r.take(f, n, whole), nil
}

// hunt returns the next handshake frame, wherever it begins.
func (r *frameReader) hunt() (frame, error) {
	r.release()
	for {
		h, err := r.br.Peek(headerLen)
		if err != nil {
			return frame{}, err
		}
		f, n, ok := parseHeader(h)
		if !ok || !f.handshake() {
			r.skipToMagic()
			continue
		}
		whole, ok, err := r.body(n)
		if err != nil {
			return frame{}, err
		}
		if !ok {
			r.skipToMagic()
			continue
		}
		return r.take(f, n, whole), nil
	}
}

// body waits for the frame at hand, with a payload of n bytes, and tells its
// whole length and whether the payload's checksum holds.
func (r *frameReader) body(n int) (whole int, ok bool, err error) {
	if n == 0 {
		return headerLen, true, nil
	}
	whole = headerLen + n + trailerLen
	b, err := r.br.Peek(whole)
	if err != nil {
		return 0, false, err
	}
	p, sum := b[headerLen:headerLen+n], binary.BigEndian.Uint32(b[headerLen+n:])
	return whole, checksum(p) == sum, nil
}

// take returns f with its payload, which is buffered.
func (r *frameReader) take(f frame, n, whole int) frame {
	b, _ := r.br.Peek(whole) // buffered: body has waited for it
	f.payload = b[headerLen : headerLen+n : headerLen+n]
	r.used = whole
	return f
}

// skipPadding drops zero bytes up to the next other one.
func (r *frameReader) skipPadding() error {
	for {
		if _, err := r.br.Peek(1); err != nil {
			return err
		}
		b, _ := r.br.Peek(r.br.Buffered())
		rest := bytes.TrimLeft(b, "\x00")
		r.drop(len(b) - len(rest))
		if len(rest) > 0 {
			return nil
		}
	}
}

// skipToMagic drops at least one byte, up to the next that may begin a frame.
func (r *frameReader) skipToMagic() {
	b, _ := r.br.Peek(r.br.Buffered())
	n := len(b)
	if i := bytes.IndexByte(b[1:], magic()[0]); i >= 0 {
		n = i + 1
	}
	r.skipped += uint64(n)
	r.drop(n)
}

// protocolError is a peer that breaks the rules.
func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}
