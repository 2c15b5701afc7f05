package qmp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/testenv"
)

// hearFile hears a command and the file that came with it.
func (p peer) hearFile(t *testing.T) (line string, f *os.File) {
	t.Helper()
	buf, oob := make([]byte, 1<<16), make([]byte, 64)
	n, m, _, _, err := p.Conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
	if err != nil {
		t.Errorf("peer hears: %v", err)
		return "", nil
	}
	messages, err := unix.ParseSocketControlMessage(oob[:m])
	if err == nil && len(messages) == 1 {
		if fds, err := unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			f = os.NewFile(uintptr(fds[0]), "passed")
		}
	}
	return string(buf[:n]), f
}

func TestPass(t *testing.T) {
	c, p := connect(t, nil)
	ours, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	go func() {
		line, f := p.hearFile(t)
		if f == nil || !strings.Contains(line, `"execute":"add-fd"`) {
			t.Errorf("peer heard %q with file %v", line, f)
			p.Close()
			return
		}
		fmt.Fprint(f, "through the file")
		f.Close()
		p.say(`{"return": {"fdset-id": 7}, "id": 2}`)
	}()
	var got struct {
		Set int `json:"fdset-id"`
	}
	if err := c.Pass(testenv.Context(t), theirs, "add-fd", nil, &got); err != nil || got.Set != 7 {
		t.Errorf("pass: %+v, %v", got, err)
	}
	theirs.Close()
	if b, err := io.ReadAll(ours); err != nil || string(b) != "through the file" {
		t.Errorf("the file: %q, %v", b, err)
	}
}

// TestPassTakesTurns gives a command up that waits for the one before.
func TestPassTakesTurns(t *testing.T) {
	c, p := connect(t, nil)
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	first := make(chan error, 1)
	go func() { first <- c.Pass(testenv.Context(t), file, "add-fd", nil, nil) }()
	if _, f := p.hearFile(t); f != nil {
		f.Close()
	}
	ctx, cancel := context.WithCancel(testenv.Context(t))
	second := make(chan error, 1)
	go func() { second <- c.Pass(ctx, file, "add-fd", nil, nil) }()
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("the second command: %v", err)
	}
	p.say(`{"return": {}, "id": 2}`)
	if err := <-first; err != nil {
		t.Errorf("the first command: %v", err)
	}
}
