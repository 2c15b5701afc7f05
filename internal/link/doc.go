// Package link is the byte channel between hutchd and the guest agent: one
// virtio-serial port, which is a dumb pipe of bytes, turned into sessions that
// survive the death of either end, and into any number of streams within a
// session.
//
// It owns the facts of the wire that both sides share (port names, frames,
// handshake, versions, targets, limits), the host's end (Dial, Session) and the
// guest's end (Listen, OpenPort). It never starts or stops agents or VMs, never
// reconnects the host's side (guestconn does), and knows no RPC.
//
// # What the pipe does to us
//
// The guest may never learn that the host's side was closed and opened again.
// Bytes of the former connection, cut anywhere, are still delivered. While the
// host is away the guest's reads return EOF at once and its writes wait. The
// host learns nothing when the guest's agent restarts. The only things the pipe
// promises are that bytes arrive in order, and that within one connection of
// two living ends none is lost.
//
// # Frames
//
// Everything is a frame:
//
//	 0  4  magic d1 68 4c 6b
//	 4  1  layout, 1
//	 5  1  type
//	 6  2  length of the payload, at most 32740
//	 8  4  stream, 0 for the session itself
//	12  8  tag of the session, 0 in the handshake
//	20  4  low 32 bits of XXH64 of the 20 bytes before
//	24  n  payload, and when n > 0:
//	    4  the same of the payload
//
// Numbers are big-endian. Zero bytes between frames are padding. A frame with
// everything is at most 32 KiB, which is what the guest kernel passes on in one
// piece.
//
// # Handshake
//
//	host   padding (32 KiB), HELLO {versions, nonce H, window}; repeated
//	guest  ACK {version, H, nonce G, window, agent version, features}
//	host   GO {H, G}
//	guest  UP, the first frame with the session's tag, a digest of H and G
//
// The padding completes whatever frame the former host left cut in the pipe:
// its checksum fails, and the HELLO behind it stands at a frame border. A guest
// that starts sends padding and READY, so that the host need not wait for a
// time-out; a READY within a session tells the host that the agent has
// restarted.
//
// # Why user data can't be taken for a handshake
//
// Within a session both sides know every frame border and never look into
// payloads; a HELLO is recognised between frames only, and a frame that fails
// its checksum is dropped as a whole. Only a side that has lost the borders
// (it has just started, or the other side died in the middle of a frame) hunts
// through bytes that may be user data. What it finds there can have no effect:
// the host acts only on an ACK with its own fresh H, the guest begins a session
// only with a GO that carries the G it has just made up, and neither number
// existed when that data was written. A copied or forged HELLO earns an ACK
// that nobody waits for. A GO or session frame of the past matches nothing.
//
// # Streams
//
// Only the host opens streams. OPEN carries a preface: its version and the
// target, "api", "tcp:<port>", "udp:<port>", "unix:<name>" or "call:<name>". STATUS
// answers before data flows. DATA is bounded by the window that the reader grants;
// FIN ends one direction; STOP says that the sender reads no more; RESET ends both
// directions at once.
//
// A stream to a TCP port or to a Unix socket, of which the agent has a list by
// names, is that connection. What a Unix socket's peer wrote before it closed
// always arrives whole, as it does within one machine; a TCP reset is a RESET. A
// stream to a UDP port is one flow: the agent has a socket of its own for it, and
// a datagram is its length in two bytes and itself.
//
// A call is a stream of records: a byte for the kind, the length in four bytes,
// and that many bytes. The host sends one record of kind 0, its request, behind
// OPEN without waiting for STATUS. The guest sends a record of kind 0 for each
// reply, and when the call fails one of kind 1 (name of the error's class, line
// feed, words), and ends its side. The host ends its side when it wants no more.
//
// The multiplexer is our own, and not one of the usual libraries, because the
// frames above are needed anyway, and because of what a paused or hostile guest
// does to those: opening, writing and closing a stream waited for the other
// side without regard for deadlines, a lost session looked like a clean end of
// file, there was no reset, pings grew a goroutine each, and the smallest
// window was 256 KiB. Here there is no keep-alive and no time-out that a paused
// VM could trip over; all that is due to be sent is a few flags and one bounded
// buffer per stream.
//
// # Bounds
//
// Per session: two buffers of 64 KiB, MaxStreams streams. Per stream: one
// window (128 KiB) to be read and one send buffer (64 KiB), in pieces of
// 32 KiB. A peer that breaks the rules loses its session.
//
// # Tests
//
// A fake port with the manners listed above; nettest.TestConn; a digest over a
// gigabyte; 200 parallel streams; killing the host in the middle of transfers a
// hundred times, the guest twenty times; data made of copied handshakes; fuzzing
// of frames and handshake; a hostile guest whose cost is measured. The same
// over QEMU's real virtio-serial is in test/e2e.
package link
