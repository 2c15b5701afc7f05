package link

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

func seeds(f *testing.F) {
	whole := forgery(nil)
	f.Add([]byte(nil))
	f.Add(whole)
	f.Add(whole[5:])
	f.Add(whole[:len(whole)-3])
	f.Add(padding(100, whole))
	f.Add(appendFrame(nil, frame{typ: typeData, stream: 1, tag: 9, payload: whole}))
}

// FuzzFrames: whatever is read as a frame stands in the input as such, in
// order, without overlap.
func FuzzFrames(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, hunting := range []bool{false, true} {
			fr, rest := newFrameReader(bytes.NewReader(in)), in
			for {
				read := fr.next
				if hunting {
					read = fr.hunt
				}
				got, err := read()
				if errors.Is(err, errFraming) {
					hunting = true
					continue
				}
				if err != nil {
					break
				}
				enc := appendFrame(nil, got)
				i := bytes.Index(rest, enc)
				if i < 0 {
					t.Fatalf("frame %v is not in the input", got)
				}
				rest = rest[i+len(enc):]
			}
		}
	})
}

// script is a port or connection that delivers fixed input.
type script struct {
	io.Reader
	net.Conn
}

func (s script) Read(p []byte) (int, error)       { return s.Reader.Read(p) }
func (s script) Write(p []byte) (int, error)      { return len(p), nil }
func (s script) Close() error                     { return nil }
func (s script) SetDeadline(time.Time) error      { return nil }
func (s script) SetReadDeadline(time.Time) error  { return nil }
func (s script) SetWriteDeadline(time.Time) error { return nil }

// FuzzGuestHandshake: no input that was made before begins a session.
func FuzzGuestHandshake(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		l := &Listener{p: ListenParams{versions: [2]uint16{MinVersion, MaxVersion}}}
		l.p.Log = discard()
		c := &guestPort{l: l, kick: make(chan struct{}, 1)}
		fr := newFrameReader(bytes.NewReader(in))
		for {
			got, err := fr.hunt()
			if err != nil {
				return
			}
			if synced, _ := c.take(got, false); synced || c.cur != nil {
				t.Fatal("a session began")
			}
			c.fill(make([]byte, 0, ioBuffer))
		}
	})
}

// FuzzHostHandshake: no input that was made before is taken for a guest.
func FuzzHostHandshake(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		if _, err := Dial(t.Context(), script{Reader: bytes.NewReader(in)}, DialParams{}); err == nil {
			t.Fatal("a session began")
		}
	})
}

// FuzzSession: whatever frames come within a session, buffers keep their
// bounds. Each frame is made of type, stream, length and that many bytes.
func FuzzSession(f *testing.F) {
	f.Add(true, []byte{typeStatus, 1, 1, 0, typeData, 1, 3, 'a', 'b', 'c', typeFin, 1, 0, typeStop, 1, 0, typeReset, 2, 0})
	f.Add(false, []byte{typeOpen, 1, 4, 1, 'a', 'p', 'i', typeData, 1, 1, 'x', typeWindow, 1, 4, 0, 0, 1, 0, typeFin, 1, 0})
	f.Fuzz(func(t *testing.T, host bool, in []byte) {
		m := newMux(muxParams{host: host, peerWindow: Window, kick: make(chan struct{}, 1), opened: func(*Stream) {}})
		if host {
			for range 3 {
				m.openNoWait()
			}
			m.fill(make([]byte, 0, ioBuffer))
		}
		for len(in) >= 3 {
			fr := frame{typ: in[0], stream: uint32(in[1]), payload: in[3:min(len(in), 3+int(in[2]))]}
			in = in[min(len(in), 3+int(in[2])):]
			if err := m.handle(fr); err != nil {
				m.fail(err)
				break
			}
			for _, s := range m.streams {
				if s.rbuf.n > Window || s.window > maxWindow {
					t.Fatalf("stream %d: %d bytes buffered, window %d", s.id, s.rbuf.n, s.window)
				}
				_, _ = s.Write([]byte("out"))
				if s.id%2 == 0 {
					_ = s.Close()
				}
			}
			if out := m.fill(make([]byte, 0, ioBuffer)); cap(out) != ioBuffer {
				t.Fatal("more was sent than fits")
			}
		}
	})
}

// openNoWait opens a stream and does not wait for the answer.
func (m *mux) openNoWait() *Stream {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastID++
	s := newStream(m, m.lastID, targetAPI)
	m.streams[s.id] = s
	s.due.open = true
	m.enqueue(s)
	return s
}
