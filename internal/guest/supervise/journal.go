package supervise

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	// keptLog is what is kept of a unit's log, in bytes.
	keptLog = 256 << 10
	// maxChunk bounds one piece of a log that is followed, in bytes.
	maxChunk = 32 << 10
)

// journal is what a unit writes. Its FIFO stays from program to program, and
// from server to server.
type journal struct {
	path string
	log  *slog.Logger

	reading sync.WaitGroup

	mu    sync.Mutex
	fifo  *os.File // nil: not open
	ring  ring
	grown chan struct{} // closed when the ring grows; nil: nobody waits
	over  bool          // it is closed for good
}

func newJournal(dir, name string, log *slog.Logger) *journal {
	return &journal{path: filepath.Join(dir, name+".log"), log: log, ring: ring{max: keptLog}}
}

// open makes the FIFO and begins to read it. It may be open already.
func (j *journal) open() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fifo != nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(j.path), 0o700); err != nil {
		return fmt.Errorf("make a log: %w", err)
	}
	if err := unix.Mkfifo(j.path, 0o600); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "make fifo", Path: j.path, Err: err}
	}
	// Open for writing too, it has no end of file when no program has it.
	f, err := os.OpenFile(j.path, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a log: %w", err)
	}
	j.fifo = f
	j.reading.Go(func() { j.read(f) })
	return nil
}

// writer opens the end that a program writes to: for reading too, so that it
// always has a reader, even while no server runs.
func (j *journal) writer() (int, error) {
	fd, err := unix.Open(j.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open log", Path: j.path, Err: err}
	}
	return fd, nil
}

// read fills the ring until the FIFO is closed.
func (j *journal) read(f *os.File) {
	rc, err := f.SyscallConn()
	if err == nil {
		err = rc.Read(func(fd uintptr) bool {
			for j.take(int(fd)) {
			}
			return false
		})
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		j.log.Warn("read the log of a service", "log", j.path, "error", err)
	}
}

// drain takes what is in the FIFO now.
func (j *journal) drain() {
	j.mu.Lock()
	f := j.fifo
	j.mu.Unlock()
	if f == nil {
		return
	}
	if rc, err := f.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { j.take(int(fd)) })
	}
}

// maxTake bounds what is taken in one turn, in pieces: others want the lock.
const maxTake = 32

// take moves what is there to the ring, and reports whether there is more. The
// lock makes one piece follow the other, whoever takes them.
func (j *journal) take(fd int) (more bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var buf [4 << 10]byte
	for range maxTake {
		n, err := unix.Read(fd, buf[:])
		if err == unix.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return false
		}
		j.write(buf[:n])
	}
	return true
}

// write is called with the lock held.
func (j *journal) write(p []byte) {
	j.ring.write(p)
	if j.grown != nil {
		close(j.grown)
		j.grown = nil
	}
}

// say puts a line of the supervisor's own between those of the programs.
func (j *journal) say(text string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.write([]byte("[hutch-agent] " + text + "\n"))
}

// last returns the last lines, bounded each.
func (j *journal) last(n int) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	from := j.ring.lines(n)
	data, _, _ := j.ring.read(from, keptLog)
	var lines []string
	for line := range strings.Lines(string(data)) {
		if line := oneLine(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// close ends the reading, and those who follow.
func (j *journal) close() {
	j.mu.Lock()
	j.over = true
	if j.grown != nil {
		close(j.grown)
		j.grown = nil
	}
	f := j.fifo
	j.mu.Unlock()
	if f != nil {
		_ = f.Close()
		j.reading.Wait()
	}
}

// next returns what is there from pos on: whole lines, but for a last one that
// is not finished. Without data it returns what to wait for, nil when no more
// will come.
func (j *journal) next(pos uint64) (data []byte, after, lost uint64, grown <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	data, after, lost = j.ring.read(pos, maxChunk)
	if len(data) > 0 || lost > 0 || j.over {
		return data, after, lost, nil
	}
	if j.grown == nil {
		j.grown = make(chan struct{})
	}
	return nil, pos, 0, j.grown
}

// Chunk is a piece of a log.
type Chunk struct {
	// Data are lines, each with its newline but one that is not finished yet.
	Data []byte
	// Lost counts the bytes missing before Data: they were written faster than
	// they were taken.
	Lost uint64
}

// Follow gives send the last tail lines of a unit's log, 0 being all that are
// kept, and then, with follow, what is written until ctx ends or send returns
// an error, which it returns.
func (s *Supervisor) Follow(ctx context.Context, name string, tail int, follow bool, send func(Chunk) error) error {
	s.mu.Lock()
	u := s.find(name)
	s.mu.Unlock()
	if u == nil {
		return fault.New(fault.NotFound, "there is no service %.40q with a log; there are %s", name, strings.Join(s.Names(), ", "))
	}
	return u.journal.follow(ctx, tail, follow, send)
}

func (j *journal) follow(ctx context.Context, tail int, follow bool, send func(Chunk) error) error {
	j.drain()
	j.mu.Lock()
	pos := j.ring.lines(tail)
	j.mu.Unlock()
	for {
		data, after, lost, grown := j.next(pos)
		pos = after
		switch {
		case len(data) > 0 || lost > 0:
			if err := send(Chunk{Data: data, Lost: lost}); err != nil {
				return err
			}
			continue
		case !follow || grown == nil:
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// ring is the end of a stream. Positions count from its beginning.
type ring struct {
	max   int
	data  []byte
	start uint64 // position of data[0]
}

// write appends, and forgets what is too old. It keeps up to twice as much, so
// that most writes move nothing.
func (r *ring) write(p []byte) {
	r.data = append(r.data, p...)
	if len(r.data) >= 2*r.max {
		r.cut(len(r.data) - r.max)
	}
}

func (r *ring) cut(n int) {
	r.data = append(r.data[:0], r.data[n:]...)
	r.start += uint64(n)
}

// lines returns the position of the n-th last line, or of the oldest one that
// is kept whole; 0 means all.
func (r *ring) lines(n int) uint64 {
	from := 0
	if over := len(r.data) - r.max; over > 0 {
		from = over
	}
	if r.start+uint64(from) > 0 {
		if i := bytes.IndexByte(r.data[from:], '\n'); i >= 0 {
			from += i + 1
		}
	}
	if n > 0 {
		end := len(r.data)
		if end > 0 && r.data[end-1] == '\n' {
			end--
		}
		for ; n > 0 && end >= from; n-- {
			end = bytes.LastIndexByte(r.data[:max(end, 0)], '\n')
		}
		from = max(from, end+1)
	}
	return r.start + uint64(from)
}

// read returns up to limit bytes from pos on, the position behind them, and how
// many are missing before them: where some were forgotten, it goes on with the
// next line. A piece that is cut off ends with a line.
func (r *ring) read(pos uint64, limit int) (data []byte, after, lost uint64) {
	if pos < r.start {
		next := r.start + uint64(bytes.IndexByte(r.data, '\n')+1)
		lost, pos = next-pos, next
	}
	rest := r.data[pos-r.start:]
	if len(rest) > limit {
		rest = rest[:limit]
		if i := bytes.LastIndexByte(rest, '\n'); i >= 0 {
			rest = rest[:i+1]
		}
	}
	return bytes.Clone(rest), pos + uint64(len(rest)), lost
}
