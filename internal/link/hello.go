package link

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"log/slog"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Hello is what the guest agent says of itself when a session begins.
type Hello struct {
	// Version is the protocol version of the session.
	Version uint16
	// AgentVersion is the agent's own version, at most 64 bytes of printable
	// ASCII.
	AgentVersion string
	// Features are names of what the agent can do beyond the version, each of
	// letters, digits, '-', '_' and '.', together at most 512 bytes.
	Features []string
}

// VersionError says that host and guest have no protocol version in common.
type VersionError struct {
	HostMin, HostMax, GuestMin, GuestMax uint16
}

// Error tells both ranges and what to do.
func (e *VersionError) Error() string {
	return fmt.Sprintf("link protocol: host speaks versions %d to %d, guest agent %d to %d: use a kernel pack built with this hutchd",
		e.HostMin, e.HostMax, e.GuestMin, e.GuestMax)
}

type nonce [16]byte

// newNonce returns a number that nobody could know before.
func newNonce() nonce {
	var n nonce
	rand.Read(n[:]) // never fails
	return n
}

// tagBySum is the first version in which the checksum of frames makes the tag.
// It keeps no secret and resists nobody, nor does it need to: half of what goes
// in is fresh, and a side that lies about its half finds its own session only.
// Version 1 took SHA-256, code that a copy of a guest runs for nothing else.
const tagBySum = 2

// sessionTag names the session that both nonces belong to.
func sessionTag(version uint16, host, guest nonce) uint64 {
	names := append(append([]byte("hutch link session\x00"), host[:]...), guest[:]...)
	if version >= tagBySum {
		return xxhash.Sum64(names) | 1
	}
	sum := sha256.Sum256(names)
	return binary.BigEndian.Uint64(sum[:]) | 1
}

// helloMsg is the payload of HELLO.
type helloMsg struct {
	min, max uint16
	nonce    nonce
	window   uint32
}

func (m helloMsg) encode() []byte {
	b := binary.BigEndian.AppendUint16(nil, m.min)
	b = binary.BigEndian.AppendUint16(b, m.max)
	b = append(b, m.nonce[:]...)
	return binary.BigEndian.AppendUint32(b, m.window)
}

// parseHello reads a HELLO. What a later version appends is ignored.
func parseHello(b []byte) (helloMsg, bool) {
	if len(b) < 24 {
		return helloMsg{}, false
	}
	m := helloMsg{
		min: binary.BigEndian.Uint16(b), max: binary.BigEndian.Uint16(b[2:]),
		nonce: nonce(b[4:20]), window: binary.BigEndian.Uint32(b[20:]),
	}
	return m, m.min <= m.max && windowOK(m.window)
}

// ackMsg is the payload of ACK.
type ackMsg struct {
	version     uint16
	host, guest nonce
	window      uint32
	hello       Hello
}

func (m ackMsg) encode() []byte {
	b := binary.BigEndian.AppendUint16(nil, m.version)
	b = append(b, m.host[:]...)
	b = append(b, m.guest[:]...)
	b = binary.BigEndian.AppendUint32(b, m.window)
	b = appendText(b, m.hello.AgentVersion)
	return appendText(b, strings.Join(m.hello.Features, ","))
}

// parseAck reads an ACK. What a later version appends is ignored.
func parseAck(b []byte) (ackMsg, bool) {
	if len(b) < 38 {
		return ackMsg{}, false
	}
	m := ackMsg{
		version: binary.BigEndian.Uint16(b), host: nonce(b[2:18]), guest: nonce(b[18:34]),
		window: binary.BigEndian.Uint32(b[34:]),
	}
	agent, b, ok := cutText(b[38:])
	if !ok {
		return ackMsg{}, false
	}
	features, _, ok := cutText(b)
	if !ok {
		return ackMsg{}, false
	}
	m.hello = Hello{Version: m.version, AgentVersion: agent}
	if features != "" {
		m.hello.Features = strings.Split(features, ",")
	}
	return m, m.hello.check() == nil && windowOK(m.window)
}

// check tells whether h fits into an ACK and is fit to be shown.
func (h Hello) check() error {
	if len(h.AgentVersion) > 64 || strings.ContainsFunc(h.AgentVersion, func(r rune) bool { return r < ' ' || r > '~' }) {
		return fmt.Errorf("agent version %q: want at most 64 bytes of printable ASCII", h.AgentVersion)
	}
	if len(strings.Join(h.Features, ",")) > 512 {
		return fmt.Errorf("%d features: want at most 512 bytes together", len(h.Features))
	}
	for _, f := range h.Features {
		if f == "" || strings.ContainsFunc(f, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.'
		}) {
			return fmt.Errorf("feature %q: want letters, digits, '-', '_' and '.'", f)
		}
	}
	return nil
}

// goMsg is the payload of GO.
type goMsg struct{ host, guest nonce }

func (m goMsg) encode() []byte { return append(append([]byte(nil), m.host[:]...), m.guest[:]...) }

func parseGo(b []byte) (goMsg, bool) {
	if len(b) < 32 {
		return goMsg{}, false
	}
	return goMsg{nonce(b[:16]), nonce(b[16:32])}, true
}

// refuseMsg is the payload of REFUSE: the guest speaks none of the versions
// offered.
type refuseMsg struct {
	min, max uint16
	host     nonce
}

func (m refuseMsg) encode() []byte {
	b := binary.BigEndian.AppendUint16(nil, m.min)
	b = binary.BigEndian.AppendUint16(b, m.max)
	return append(b, m.host[:]...)
}

func parseRefuse(b []byte) (refuseMsg, bool) {
	if len(b) < 20 {
		return refuseMsg{}, false
	}
	return refuseMsg{binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), nonce(b[4:20])}, true
}

func windowOK(w uint32) bool { return w >= minWindow && w <= maxWindow }

func appendText(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

func cutText(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 2 {
		return "", nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; len(b) < n {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}

// padding is n zero bytes, then what follows.
func padding(n int, follow []byte) []byte {
	return append(make([]byte, n, n+len(follow)), follow...)
}

// discard is the log of those who gave none.
func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
