package link

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
	"sync"
)

// mux is the streams of one session. It does no input or output: its owner
// hands it the frames that come in, and asks it for those that are due whenever
// kick has a value. Nothing in it waits for the peer except the streams' own
// blocking calls.
type mux struct {
	host       bool
	tag        uint64
	peerWindow int
	kick       chan<- struct{} // capacity 1
	done       chan struct{}   // closed when err is set
	// opened takes a stream that the host opened; it must not block.
	opened func(*Stream)
	pool   sync.Pool // of *piece

	mu      sync.Mutex
	err     error
	up      bool // UP is due
	streams map[uint32]*Stream
	lastID  uint32
	ready   []*Stream // those with something due, each once, in turn
}

type muxParams struct {
	host       bool
	tag        uint64
	peerWindow uint32
	kick       chan<- struct{}
	opened     func(*Stream)
}

func newMux(p muxParams) *mux {
	return &mux{
		host: p.host, tag: p.tag, peerWindow: int(p.peerWindow), kick: p.kick, opened: p.opened,
		done: make(chan struct{}), streams: map[uint32]*Stream{}, up: !p.host,
	}
}

// wake tells the owner that something is due.
func (m *mux) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// fail ends the session and all its streams. Only the first call counts.
func (m *mux) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	for _, s := range m.streams {
		s.lose(fmt.Errorf("%w: %w", ErrEnded, err))
	}
	m.streams, m.ready = nil, nil
	close(m.done)
	m.wake()
}

// failure returns what the session died of, or nil.
func (m *mux) failure() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// begin opens a stream without waiting for the guest's answer. An early stream
// sends what is written before the answer comes; when that is a refusal, its
// reads fail with it.
func (m *mux) begin(target string, early bool) (*Stream, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.err != nil:
		return nil, fmt.Errorf("open %s in guest: %w: %w", target, ErrEnded, m.err)
	case len(m.streams) >= MaxStreams:
		return nil, fmt.Errorf("open %s in guest: %w", target, ErrStreams)
	case m.lastID == math.MaxUint32:
		return nil, fmt.Errorf("open %s in guest: stream numbers of this session are used up", target)
	}
	m.lastID++
	s := newStream(m, m.lastID, target)
	s.early = early
	m.streams[s.id] = s
	s.due.open = true
	m.enqueue(s)
	return s, nil
}

// open opens a stream and waits for the guest's answer.
func (m *mux) open(ctx context.Context, target string) (*Stream, error) {
	s, err := m.begin(target, false)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	stop := context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		s.rcond.Broadcast()
	})
	defer stop()
	for !s.answered && s.rerr == nil && ctx.Err() == nil {
		s.rcond.Wait()
	}
	switch {
	case s.rerr != nil:
		return nil, fmt.Errorf("open %s in guest: %w", target, s.rerr)
	case s.answered && s.status.Status == StatusOK:
		return s, nil
	case s.answered:
		delete(m.streams, s.id)
		return nil, &s.status
	}
	s.reset()
	return nil, fmt.Errorf("open %s in guest: %w", target, context.Cause(ctx))
}

// enqueue gives s a turn to send. Called with mu held.
func (m *mux) enqueue(s *Stream) {
	if m.err != nil || s.queued || !s.hasDue() {
		return
	}
	s.queued = true
	m.ready = append(m.ready, s)
	m.wake()
}

// controlRoom is more than all control frames of one stream take.
const controlRoom = 1 << 10

// fill appends what is due to buf, within its capacity, each stream in turn.
// When not all fits, kick has a value again.
func (m *mux) fill(buf []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return buf
	}
	if m.up {
		m.up = false
		buf = appendFrame(buf, frame{typ: typeUp, tag: m.tag})
	}
	for len(m.ready) > 0 && cap(buf)-len(buf) >= controlRoom+headerLen+trailerLen {
		s := m.ready[0]
		m.ready[0] = nil
		m.ready = m.ready[1:]
		s.queued = false
		buf = s.emit(buf)
		m.enqueue(s)
	}
	if len(m.ready) > 0 {
		m.wake()
	}
	return buf
}

// handle takes one frame of the session. An error means that the peer broke
// the rules; the owner then fails the session.
func (m *mux) handle(f frame) error {
	if f.tag != m.tag {
		return protocolError("frame of another session")
	}
	m.mu.Lock()
	if f.typ == typeOpen {
		s, err := m.handleOpen(f)
		m.mu.Unlock()
		if s != nil {
			m.opened(s)
		}
		return err
	}
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	if f.stream == 0 || f.stream > m.lastID {
		return protocolError("frame of type %d for stream %d, which was never opened", f.typ, f.stream)
	}
	s, ok := m.streams[f.stream]
	if !ok {
		return nil // it has ended on this side, and the peer does not know yet
	}
	if m.host && !s.answered && f.typ != typeStatus && f.typ != typeReset {
		return protocolError("frame of type %d before the status of stream %d", f.typ, f.stream)
	}
	return s.handle(f)
}

// handleOpen makes the stream that the host asks for. It returns nil when
// there is nothing to be done for it. Called with mu held.
func (m *mux) handleOpen(f frame) (*Stream, error) {
	switch {
	case m.host:
		return nil, protocolError("guest opened a stream")
	case m.err != nil:
		return nil, m.err
	case f.stream <= m.lastID:
		return nil, protocolError("stream %d was opened before", f.stream)
	}
	m.lastID = f.stream
	target, err := parsePreface(f.payload)
	s := newStream(m, f.stream, target)
	m.streams[s.id] = s
	if err != nil {
		s.refuse(StatusBad, err.Error())
		return nil, nil
	}
	if len(m.streams) > MaxStreams {
		s.refuse(StatusBusy, "this session has "+strconv.Itoa(MaxStreams)+" streams")
		return nil, nil
	}
	return s, nil
}

// put appends a session frame without payload, or with one.
func (m *mux) put(buf []byte, typ uint8, stream uint32, payload []byte) []byte {
	return appendFrame(buf, frame{typ: typ, stream: stream, tag: m.tag, payload: payload})
}

func windowPayload(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }
