package qemu

import (
	"bytes"
	"net"
	"sync"
	"time"

	"github.com/hutch-run/hutch/internal/proc"
)

// Bounds of the console. A guest may write without end: what it writes beyond
// the rate waits in the guest, not here.
const (
	consoleBytesPerSecond = 4 << 20
	maxConsoleLine        = 512
)

// panicMark is how a Linux kernel begins its last message.
const panicMark = "Kernel panic - not syncing"

// console is what hutchd sees of a guest's console.
type console struct {
	log  *proc.CappedFile
	tail proc.Tail

	mu    sync.Mutex
	line  []byte // the current one, at most maxConsoleLine; guarded by mu
	panic string // the first panic message; guarded by mu
}

// copy reads conn into the log until it ends or stop is closed.
func (c *console) copy(conn net.Conn, stop <-chan struct{}) {
	buf := make([]byte, 32<<10)
	pace := time.NewTimer(0)
	defer pace.Stop()
	for {
		n, err := conn.Read(buf)
		c.take(buf[:n])
		if err != nil {
			return
		}
		pace.Reset(time.Duration(n) * time.Second / consoleBytesPerSecond)
		select {
		case <-pace.C:
		case <-stop:
			return
		}
	}
}

func (c *console) take(p []byte) {
	c.log.Write(p) // takes every byte
	c.tail.Write(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(p) > 0 {
		line, rest, ended := bytes.Cut(p, []byte("\n"))
		c.line = append(c.line, line[:min(len(line), maxConsoleLine-len(c.line))]...)
		p = rest
		if ended {
			c.scanLocked()
			c.line = c.line[:0]
		}
	}
}

// scanLocked looks for a panic in the current line.
func (c *console) scanLocked() {
	if c.panic != "" {
		return
	}
	if i := bytes.Index(c.line, []byte(panicMark)); i >= 0 {
		c.panic = proc.Printable(string(bytes.TrimRight(c.line[i:], "\r")))
	}
}

// panicText returns the kernel's panic message, or "".
func (c *console) panicText() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.scanLocked() // a machine may end before the line does
	return c.panic
}
