// Package qmp speaks QEMU's machine protocol: one JSON object a line over a
// stream, a greeting first, then commands with ids, answers and events.
//
// It owns the framing, the matching of answers to commands, and the bounds on
// both. It knows no command but qmp_capabilities, and it never trusts its
// peer: a VMM may have been taken over by its guest. A connection that breaks
// is not mended here; the caller makes a new one.
//
// The protocol is described in QEMU's docs/interop/qmp-spec. Tested against a
// peer in the test that misbehaves in every way that came to mind.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/fault"
)

// maxLine bounds a line of the peer, in bytes. The longest that a used command
// gives is far below.
const maxLine = 1 << 20

// Event is something that happened in the machine.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// Error is a refusal by QEMU.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

// Error tells what QEMU said.
func (e *Error) Error() string { return e.Desc }

// Client is one connection. It is safe for concurrent use.
type Client struct {
	conn    net.Conn
	in      *bufio.Reader
	onEvent func(Event)
	done    chan struct{} // closed when the reader has ended
	err     error         // set before done is closed

	writing chan struct{} // holds a token while a command is written
	passing chan struct{} // holds a token while a command with a file runs

	mu      sync.Mutex
	next    uint64                  // guarded by mu
	waiting map[uint64]chan message // guarded by mu
	closed  bool                    // guarded by mu
}

// message is any line of the peer.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *Error          `json:"error"`
	ID       *uint64         `json:"id"`
	Event
}

// New takes over conn, waits for the greeting and leaves the negotiation mode.
// onEvent is called for every event, one after the other, by the goroutine that
// reads: it must not block and must not call the client. When New fails, conn is
// closed.
func New(ctx context.Context, conn net.Conn, onEvent func(Event)) (*Client, error) {
	c := &Client{
		conn: conn, in: bufio.NewReader(conn), onEvent: onEvent,
		done: make(chan struct{}), writing: make(chan struct{}, 1), passing: make(chan struct{}, 1), waiting: map[uint64]chan message{},
	}
	if err := c.greet(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet QEMU: %w", err)
	}
	go c.read()
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) greet(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.conn.SetReadDeadline(time.Unix(1, 0)) })
	m, err := c.readMessage()
	if !stop() {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	if m.Greeting == nil {
		return errors.New("it said something else first")
	}
	return nil
}

// readMessage reads one line.
func (c *Client) readMessage() (message, error) {
	var m message
	var line []byte
	for {
		part, err := c.in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return m, fmt.Errorf("a line of more than %d bytes", maxLine)
		}
		if err == nil {
			break
		}
		if errors.Is(err, io.EOF) && len(line) > 0 {
			return m, io.ErrUnexpectedEOF
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return m, err
		}
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("parse a line: %w", err)
	}
	return m, nil
}

func (c *Client) read() {
	var err error
	for err == nil {
		var m message
		if m, err = c.readMessage(); err == nil {
			c.dispatch(m)
		}
	}
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		err = os.ErrClosed
	}
	c.err = err
	close(c.done)
}

func (c *Client) dispatch(m message) {
	if m.Event.Name != "" {
		if c.onEvent != nil {
			c.onEvent(m.Event)
		}
		return
	}
	if m.ID == nil {
		return // nothing that was asked
	}
	c.mu.Lock()
	answer := c.waiting[*m.ID]
	delete(c.waiting, *m.ID)
	c.mu.Unlock()
	if answer != nil {
		answer <- m // has room for it
	}
}

// Execute runs a command and decodes its answer into result, which may be nil.
// A refusal by QEMU is an *Error; a lost connection is a fault.Unavailable.
// When ctx ends first the command may still be carried out.
func (c *Client) Execute(ctx context.Context, command string, arguments, result any) error {
	return c.execute(ctx, command, arguments, nil, result)
}

// Pass runs a command that takes over an open file, such as add-fd; see
// Execute. QEMU gets a duplicate. The connection must be a unix socket. QEMU
// keeps only the last file that came, so one such command runs at a time.
func (c *Client) Pass(ctx context.Context, f *os.File, command string, arguments, result any) error {
	select {
	case c.passing <- struct{}{}:
		defer func() { <-c.passing }()
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
	return c.execute(ctx, command, arguments, f, result)
}

func (c *Client) execute(ctx context.Context, command string, arguments any, f *os.File, result any) error {
	answer := make(chan message, 1)
	c.mu.Lock()
	c.next++
	id := c.next
	c.waiting[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if err := c.write(ctx, append(line, '\n'), f); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m := <-answer:
		return decode(command, m, result)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	case <-c.done:
	}
	select {
	case m := <-answer: // the last thing it said
		return decode(command, m, result)
	default:
		return fmt.Errorf("%s: %w", command, c.lost())
	}
}

func decode(command string, m message, result any) error {
	if m.Error != nil {
		return fmt.Errorf("%s: %w", command, m.Error)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("%s: parse the answer: %w", command, err)
	}
	return nil
}

// write writes a whole line, with a file if there is one, or gives the
// connection up: half a command would spoil all later ones.
func (c *Client) write(ctx context.Context, line []byte, f *os.File) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return ctx.Err()
	case <-c.done:
		return c.lost()
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		c.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	n, err := c.send(line, f)
	if !stop() {
		<-fired
		// The deadline is for this command only.
		c.conn.SetWriteDeadline(time.Time{})
		if err != nil && n == 0 {
			return ctx.Err()
		}
	}
	if err != nil {
		c.conn.Close()
		<-c.done
		return errors.Join(ctx.Err(), c.lost())
	}
	return nil
}

// send writes line. A file goes with its first byte.
func (c *Client) send(line []byte, f *os.File) (int, error) {
	if f == nil {
		return c.conn.Write(line)
	}
	conn, ok := c.conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("the connection carries no files")
	}
	n, _, err := conn.WriteMsgUnix(line, unix.UnixRights(int(f.Fd())), nil)
	if err != nil || n == len(line) {
		return n, err
	}
	rest, err := conn.Write(line[n:])
	return n + rest, err
}

func (c *Client) lost() error {
	return fault.New(fault.Unavailable, "connection to QEMU is lost: %w", c.err)
}

// Done is closed when the connection is gone; all events before its end have
// been told then.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close closes the connection and waits for the reader. It is idempotent.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.conn.Close()
	<-c.done
	return nil
}
