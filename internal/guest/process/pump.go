package process

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// terminalBacklog is more than a terminal holds back for its reader.
const terminalBacklog = 256 << 10

// buffers lends read buffers, so that a program that says nothing costs none.
type buffers struct{ pool sync.Pool }

func (b *buffers) get() *[segmentBytes]byte {
	if p, ok := b.pool.Get().(*[segmentBytes]byte); ok {
		return p
	}
	return new([segmentBytes]byte)
}

func (b *buffers) put(p *[segmentBytes]byte) { b.pool.Put(p) }

// pump moves the output of one stream into the hub.
type pump struct {
	stream Stream
	file   *os.File
	hub    *hub
	bufs   *buffers
	stop   <-chan struct{} // the table closes

	leaderGone atomic.Bool
	// drained is closed when all that the leader can have written is in the
	// hub, or nothing more can come.
	drained chan struct{}
}

// run reads to the end of the stream. After the leader's end it delivers what
// the stream holds at that moment and then reads on for nobody.
func (p *pump) run() {
	p.deliver()
	close(p.drained)
	p.discard()
}

// settle tells the pump that the leader is gone.
func (p *pump) settle() {
	p.leaderGone.Store(true)
	// Wakes a reader that waits; it clears the deadline itself.
	_ = p.file.SetReadDeadline(time.Unix(1, 0))
}

func (p *pump) deliver() {
	left := -1 // bytes still owed after the leader's end; -1 while it lives
	for {
		if !p.hub.room(p.stream, p.stop) {
			return
		}
		if left < 0 && p.leaderGone.Load() {
			left = p.pending()
		}
		if left == 0 {
			return
		}
		n, err := p.readInto(left > 0)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			_ = p.file.SetReadDeadline(time.Time{})
			continue
		case err != nil || n == 0:
			return
		}
		if left > 0 {
			left = max(0, left-n)
		}
	}
}

// readInto moves one read into the hub. With now it does not wait, and returns
// 0 when there is nothing; else 0 is the end of the stream.
func (p *pump) readInto(now bool) (int, error) {
	rc, err := p.file.SyscallConn()
	if err != nil {
		return 0, err
	}
	n := 0
	var inner error
	step := func(fd uintptr) bool {
		buf := p.bufs.get()
		defer p.bufs.put(buf)
		n, inner = read(int(fd), buf[:])
		if n > 0 {
			p.hub.append(p.stream, buf[:n])
		}
		switch {
		case errors.Is(inner, unix.EAGAIN):
			n, inner = 0, nil
			return now
		case errors.Is(inner, unix.EIO) && p.stream == Terminal && !now && !p.leaderGone.Load():
			// Nobody has the terminal open just now, but the leader lives and
			// may open it again.
			n, inner = 0, nil
			return false
		}
		return true
	}
	if now {
		err = rc.Control(func(fd uintptr) { step(fd) })
	} else {
		err = rc.Read(step)
	}
	return n, errors.Join(err, inner)
}

func read(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return max(n, 0), err
	}
}

// pending is what must still be read so that everything the leader wrote has
// been. Others may write on for ever, so it can't be "until it is empty".
func (p *pump) pending() int {
	if p.stream == Terminal {
		return terminalBacklog
	}
	n := 0
	err := control(p.file, func(fd int) error {
		var err error
		n, err = unix.IoctlGetInt(fd, unix.TIOCINQ)
		return err
	})
	if err != nil {
		return 0
	}
	return n
}

// discard keeps what processes in the background write from blocking them.
func (p *pump) discard() {
	var buf [4096]byte
	for {
		_, err := p.file.Read(buf[:])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			_ = p.file.SetReadDeadline(time.Time{})
		case err != nil:
			return
		}
	}
}
