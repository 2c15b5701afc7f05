package link

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Stream is one connection between host and guest. It is a net.Conn with a
// half close and a reset. Write returns when its bytes are in the stream's send
// buffer; neither Write nor Close ever waits for a paused guest beyond the
// deadline.
//
// A stream whose session ends delivers what had arrived, and then an error that
// is never io.EOF.
type Stream struct {
	m      *mux
	id     uint32
	target string
	wmu    sync.Mutex // held for a whole Write, so that Writes don't mix

	// All below is guarded by m.mu.
	rcond, wcond sync.Cond
	rbuf, wbuf   queue
	granted      int // bytes that the peer may still send
	consumed     int // bytes read since the last grant
	window       int // bytes that we may still send
	rdl, wdl     deadline

	early    bool        // host: send before the status has come
	answered bool        // host: the status has come; guest: it was given
	status   StatusError // the answer
	eof      bool        // FIN has come
	fin      bool        // our side is to end when wbuf is empty
	finSent  bool
	stopped  bool // the peer reads no more
	closed   bool // Close was called
	rerr     error
	werr     error
	due      due
	queued   bool // in m.ready
}

// due is the control frames that wait for their turn.
type due struct{ open, status, window, stop, reset bool }

func newStream(m *mux, id uint32, target string) *Stream {
	s := &Stream{m: m, id: id, target: target, granted: Window, window: m.peerWindow}
	s.rcond.L, s.wcond.L = &m.mu, &m.mu
	return s
}

// Target is what the stream was opened to: "api", "tcp:<port>" and so on.
func (s *Stream) Target() string { return s.target }

// Read reads what has arrived, or waits for it.
func (s *Stream) Read(p []byte) (int, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	for {
		switch {
		case s.closed:
			return 0, s.opError("read", net.ErrClosed)
		case s.rdl.hit():
			return 0, s.opError("read", os.ErrDeadlineExceeded)
		case s.rbuf.n > 0:
			if len(p) == 0 {
				return 0, nil
			}
			n := s.rbuf.pop(&s.m.pool, p)
			s.consumed += n
			if s.consumed >= Window/2 && !s.eof && s.rerr == nil {
				s.due.window = true
				s.m.enqueue(s)
			}
			return n, nil
		case s.eof:
			return 0, io.EOF
		case s.rerr != nil:
			return 0, s.opError("read", s.rerr)
		case len(p) == 0:
			return 0, nil
		}
		s.rcond.Wait()
	}
}

// Write puts p into the send buffer, and waits for room as needed.
func (s *Stream) Write(p []byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	total := 0
	for {
		if err := s.writable(); err != nil {
			return total, s.opError("write", err)
		}
		if len(p) == 0 {
			return total, nil
		}
		if n := min(len(p), sendBuffer-s.wbuf.n); n > 0 {
			s.wbuf.push(&s.m.pool, p[:n])
			p, total = p[n:], total+n
			s.m.enqueue(s)
			continue
		}
		s.wcond.Wait()
	}
}

// offer puts all of p, at most sendBuffer bytes, into the send buffer, or drops
// it when there is no room for it now.
func (s *Stream) offer(p []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if err := s.writable(); err != nil {
		return s.opError("write", err)
	}
	if len(p) <= sendBuffer-s.wbuf.n {
		s.wbuf.push(&s.m.pool, p)
		s.m.enqueue(s)
	}
	return nil
}

// writable returns why nothing may be written now. Called with mu held.
func (s *Stream) writable() error {
	switch {
	case s.closed:
		return net.ErrClosed
	case s.wdl.hit():
		return os.ErrDeadlineExceeded
	case s.werr != nil:
		return s.werr
	case s.fin || s.stopped:
		return syscall.EPIPE
	}
	return nil
}

// CloseWrite ends the sending side after what was written before. The peer
// reads it, and then EOF.
func (s *Stream) CloseWrite() error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.closed {
		return s.opError("close", net.ErrClosed)
	}
	if s.werr != nil {
		return s.opError("close", s.werr)
	}
	s.fin = true
	s.wcond.Broadcast()
	s.m.enqueue(s)
	return nil
}

// Close ends both sides. What was written before is still delivered, for as
// long as the session lives; what arrives from now on is dropped, and the peer
// is told. It never blocks.
func (s *Stream) Close() error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.rdl.set(s, &s.rcond, time.Time{})
	s.wdl.set(s, &s.wcond, time.Time{})
	s.rbuf.clear(&s.m.pool)
	if s.rerr == nil && s.werr == nil {
		s.fin = true
		s.due.stop = !s.eof
		s.due.window = false
		s.m.enqueue(s)
		s.forget()
	}
	s.broadcast()
	return nil
}

// Reset ends both sides at once and drops what is on its way. The peer's reads
// and writes fail with ECONNRESET.
func (s *Stream) Reset() {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.closed = true
	s.reset()
	s.broadcast()
}

// reset drops all content and makes RESET due. Called with mu held.
func (s *Stream) reset() {
	if s.rerr != nil && s.werr != nil {
		return
	}
	unheard := s.due.open
	s.lose(net.ErrClosed)
	s.rbuf.clear(&s.m.pool)
	if unheard {
		delete(s.m.streams, s.id)
		return
	}
	s.due.reset = true
	s.m.enqueue(s)
}

// lose makes both sides fail with err from here on; what has arrived can still
// be read. Called with mu held.
func (s *Stream) lose(err error) {
	if s.rerr == nil {
		s.rerr = err
	}
	if s.werr == nil {
		s.werr = err
	}
	s.wbuf.clear(&s.m.pool)
	s.due = due{}
	s.broadcast()
}

func (s *Stream) broadcast() {
	s.rcond.Broadcast()
	s.wcond.Broadcast()
}

// accept answers the host that the stream is open. It reports false when the
// host has given the stream up.
func (s *Stream) accept() bool { return s.answer(StatusOK, "") }

// dead tells whether the stream has ended by reset or with its session.
func (s *Stream) dead() bool {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	return s.rerr != nil
}

// refuse answers the host that the stream does not come about. Called with mu
// held.
func (s *Stream) refuse(status Status, msg string) {
	s.lose(net.ErrClosed)
	s.closed = true
	s.status = StatusError{Status: status, Msg: statusText(msg)}
	s.answered, s.due.status = true, true
	s.m.enqueue(s)
}

func (s *Stream) answer(status Status, msg string) bool {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.rerr != nil {
		return false
	}
	if status != StatusOK {
		s.refuse(status, msg)
		return true
	}
	s.answered, s.due.status = true, true
	s.m.enqueue(s)
	return true
}

// hasDue tells whether emit would have something to say.
func (s *Stream) hasDue() bool {
	return s.due != (due{}) || s.dataDue() || s.finDue()
}

func (s *Stream) dataDue() bool { return s.wbuf.n > 0 && s.window > 0 && s.open() && !s.stopped }

// open tells whether this side may send.
func (s *Stream) open() bool { return s.answered || s.early }

func (s *Stream) finDue() bool {
	return s.fin && !s.finSent && s.wbuf.n == 0 && !s.stopped && s.werr == nil && s.open()
}

// emit appends what is due: all control frames and at most one of data. buf has
// controlRoom and room for a frame's frame. Called with mu held.
func (s *Stream) emit(buf []byte) []byte {
	d := s.due
	s.due = due{}
	if d.open {
		buf = s.m.put(buf, typeOpen, s.id, encodePreface(s.target))
	}
	if d.status {
		buf = s.m.put(buf, typeStatus, s.id, append([]byte{byte(s.status.Status)}, s.status.Msg...))
		if s.status.Status != StatusOK {
			delete(s.m.streams, s.id)
			return buf
		}
	}
	if d.reset {
		delete(s.m.streams, s.id)
		return s.m.put(buf, typeReset, s.id, nil)
	}
	if d.window && s.consumed > 0 {
		buf = s.m.put(buf, typeWindow, s.id, windowPayload(s.consumed))
		s.granted += s.consumed
		s.consumed = 0
	}
	if d.stop {
		buf = s.m.put(buf, typeStop, s.id, nil)
	}
	buf = s.emitData(buf)
	if s.finDue() {
		buf = s.m.put(buf, typeFin, s.id, nil)
		s.finSent = true
	}
	s.forget()
	return buf
}

// emitData appends a frame of data when one is due and a worthwhile one fits.
func (s *Stream) emitData(buf []byte) []byte {
	if !s.dataDue() {
		return buf
	}
	room := cap(buf) - len(buf) - headerLen - trailerLen - headerLen // a FIN may follow
	n := min(s.wbuf.n, s.window, maxPayload, room)
	if n <= 0 {
		return buf
	}
	// The payload is put together where it is sent from.
	start := len(buf)
	payload := buf[start+headerLen : start+headerLen+n]
	s.wbuf.pop(&s.m.pool, payload)
	s.window -= n
	s.wcond.Broadcast()
	return s.m.put(buf, typeData, s.id, payload)
}

// forget takes s out of the session when both sides have ended. Called with mu
// held.
func (s *Stream) forget() {
	written := s.finSent || s.stopped
	read := s.eof || s.closed
	if written && read && s.due == (due{}) {
		delete(s.m.streams, s.id)
	}
}

// handle takes a frame for this stream. Called with mu held.
func (s *Stream) handle(f frame) error {
	switch f.typ {
	case typeStatus:
		return s.handleStatus(f.payload)
	case typeData:
		return s.handleData(f.payload)
	case typeWindow:
		return s.handleWindow(f.payload)
	case typeFin:
		if s.eof {
			return protocolError("second end of stream %d", s.id)
		}
		s.eof = true
		s.due.window, s.due.stop = false, false
		s.rcond.Broadcast()
		s.forget()
	case typeStop:
		s.stopped = true
		s.wbuf.clear(&s.m.pool)
		s.wcond.Broadcast()
		s.forget()
	case typeReset:
		s.rbuf.clear(&s.m.pool)
		s.eof = false
		s.lose(syscall.ECONNRESET)
		delete(s.m.streams, s.id)
	default:
		return protocolError("frame of unknown type %d", f.typ)
	}
	return nil
}

func (s *Stream) handleStatus(b []byte) error {
	if !s.m.host || s.answered || len(b) < 1 || s.due.open {
		return protocolError("status of stream %d was not asked for", s.id)
	}
	s.answered = true
	s.status = StatusError{Status: Status(b[0]), Target: s.target, Msg: statusText(string(b[1:min(len(b), 1+maxStatusText)]))}
	if s.early && s.status.Status != StatusOK {
		s.lose(&s.status)
		delete(s.m.streams, s.id)
	}
	s.rcond.Broadcast()
	return nil
}

func (s *Stream) handleData(b []byte) error {
	switch {
	case s.eof:
		return protocolError("data after the end of stream %d", s.id)
	case len(b) > s.granted:
		return protocolError("%d bytes for stream %d, which has room for %d", len(b), s.id, s.granted)
	}
	s.granted -= len(b)
	if s.closed || s.rerr != nil {
		return nil // it was told to stop
	}
	s.rbuf.push(&s.m.pool, b)
	s.rcond.Broadcast()
	return nil
}

func (s *Stream) handleWindow(b []byte) error {
	if len(b) != 4 {
		return protocolError("window of %d bytes", len(b))
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxWindow || s.window+int(n) > maxWindow {
		return protocolError("window of stream %d grows by %d to more than %d", s.id, n, maxWindow)
	}
	s.window += int(n)
	s.m.enqueue(s)
	return nil
}
