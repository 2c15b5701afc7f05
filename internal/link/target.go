package link

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// What a session or stream can die of. Test with errors.Is.
var (
	// ErrEnded is what every stream of a session that has ended fails with; the
	// reason is in the chain as well.
	ErrEnded = errors.New("link session ended")
	// ErrClosed is a session that its own side closed.
	ErrClosed = errors.New("link session is closed")
	// ErrGuestRestarted is a session whose guest agent has started anew.
	ErrGuestRestarted = errors.New("guest agent restarted")
	// ErrHostRestarted is a session whose host has connected anew.
	ErrHostRestarted = errors.New("host connected anew")
	// ErrHostAway is a session whose host has closed its end.
	ErrHostAway = errors.New("host closed its end")
	// ErrProtocol is a peer that breaks the rules.
	ErrProtocol = errors.New("link protocol violated")
	// ErrStreams is a session with MaxStreams streams.
	ErrStreams = errors.New("too many streams on the link")
)

// Status is the guest's answer to the opening of a stream.
type Status uint8

// The answers.
const (
	StatusOK Status = iota
	// StatusRefused: nothing listens there.
	StatusRefused
	// StatusUnreachable: the dial failed in another way, or took too long.
	StatusUnreachable
	// StatusDenied: the agent does not offer this target.
	StatusDenied
	// StatusBusy: the agent serves too many streams.
	StatusBusy
	// StatusBad: the preface was not understood.
	StatusBad
)

// String returns the name of s.
func (s Status) String() string {
	switch s {
	case StatusOK:
		return "ok"
	case StatusRefused:
		return "refused"
	case StatusUnreachable:
		return "unreachable"
	case StatusDenied:
		return "denied"
	case StatusBusy:
		return "busy"
	case StatusBad:
		return "bad preface"
	}
	return "status " + strconv.Itoa(int(s))
}

// StatusError is a stream that the guest did not open.
type StatusError struct {
	Status Status
	Target string
	// Msg is the guest's own words, at most 256 bytes of printable text.
	Msg string
}

// Error tells target, status and the guest's words.
func (e *StatusError) Error() string {
	if e.Msg == "" {
		return fmt.Sprintf("open %s in guest: %v", e.Target, e.Status)
	}
	return fmt.Sprintf("open %s in guest: %v: %s", e.Target, e.Status, e.Msg)
}

const (
	prefaceVersion = 1
	targetAPI      = "api"
	targetTCP      = "tcp:"
	targetUDP      = "udp:"
	targetUnix     = "unix:"
	targetCall     = "call:"
	maxTarget      = 64
	maxStatusText  = 256
)

func encodePreface(target string) []byte {
	return append([]byte{prefaceVersion}, target...)
}

// parsePreface returns the target that a stream asks for.
func parsePreface(b []byte) (string, error) {
	if len(b) < 2 || len(b) > 1+maxTarget {
		return "", fmt.Errorf("preface of %d bytes", len(b))
	}
	if b[0] != prefaceVersion {
		return "", fmt.Errorf("preface version %d: this agent speaks %d", b[0], prefaceVersion)
	}
	return string(b[1:]), nil
}

// parsePort returns the port of a "<kind><port>" target.
func parsePort(target, kind string) (uint16, bool) {
	s, ok := strings.CutPrefix(target, kind)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n > 0
}

// parseCall returns the name of a "call:<name>" target.
func parseCall(target string) (string, bool) { return strings.CutPrefix(target, targetCall) }

// statusText makes the words of a peer fit to be sent or shown.
func statusText(s string) string {
	if len(s) > maxStatusText {
		s = s[:maxStatusText]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			return '.'
		}
		return r
	}, strings.ToValidUTF8(s, "."))
}
