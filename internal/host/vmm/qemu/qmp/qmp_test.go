package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/host/vmm/qemu/qmp"
	"github.com/hutch-run/hutch/internal/testenv"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`

// peer is the QEMU side of a connection.
type peer struct {
	net.Conn
	in *bufio.Reader
}

func (p peer) say(s string) { fmt.Fprintf(p, "%s\r\n", s) }

type command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments"`
	ID        uint64          `json:"id"`
}

func (p peer) hear(t *testing.T) command {
	t.Helper()
	var c command
	line, err := p.in.ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &c)
	}
	if err != nil {
		t.Errorf("peer heard %q: %v", line, err)
	}
	return c
}

func pair(t *testing.T) (net.Conn, peer) {
	t.Helper()
	testenv.CheckGoroutines(t)
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, peer{b, bufio.NewReader(b)}
}

func connect(t *testing.T, onEvent func(qmp.Event)) (*qmp.Client, peer) {
	t.Helper()
	conn, p := pair(t)
	var wait sync.WaitGroup
	wait.Go(func() {
		p.say(greeting)
		c := p.hear(t)
		if c.Execute != "qmp_capabilities" || c.Arguments != nil {
			t.Errorf("first command %+v", c)
		}
		p.say(`{"return": {}, "id": 1}`)
	})
	c, err := qmp.New(testenv.Context(t), conn, onEvent)
	wait.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, p
}

func TestExecute(t *testing.T) {
	c, p := connect(t, nil)
	go func() {
		cmd := p.hear(t)
		p.say(fmt.Sprintf(`{"return": {"running": true, "status": %s}, "id": %d}`, cmd.Arguments, cmd.ID))
		cmd = p.hear(t)
		p.say(fmt.Sprintf(`{"id": %d, "error": {"class": "GenericError", "desc": "no such thing"}}`, cmd.ID))
		cmd = p.hear(t)
		p.say(fmt.Sprintf(`{"return": "a string", "id": %d}`, cmd.ID))
	}()
	var got map[string]any
	if err := c.Execute(testenv.Context(t), "query-status", map[string]int{"a": 1}, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]any{"running": true, "status": map[string]any{"a": 1.0}}, got); diff != "" {
		t.Error(diff)
	}
	var refusal *qmp.Error
	if err := c.Execute(testenv.Context(t), "x", nil, nil); !errors.As(err, &refusal) || refusal.Desc != "no such thing" {
		t.Errorf("refusal: %v", err)
	}
	if err := c.Execute(testenv.Context(t), "x", nil, &got); err == nil || !strings.Contains(err.Error(), "x: parse the answer") {
		t.Errorf("answer of another shape: %v", err)
	}
}

func TestAnswersInAnyOrderAmongEvents(t *testing.T) {
	const n = 50
	var mu sync.Mutex
	var events []string
	c, p := connect(t, func(e qmp.Event) {
		mu.Lock()
		defer mu.Unlock()
		events = append(events, e.Name+string(e.Data))
	})
	go func() {
		var heard []command
		for range n {
			heard = append(heard, p.hear(t))
		}
		for i := range heard {
			cmd := heard[n-1-i]
			p.say(fmt.Sprintf(`{"timestamp": {"seconds": 1}, "event": "E", "data": %d}`, i))
			p.say(fmt.Sprintf(`{"return": %s, "id": %d}`, cmd.Arguments, cmd.ID))
			p.say(`{"return": 1, "id": 99999}`) // nobody asked
			p.say(`{"return": 1}`)
			p.say(`{}`)
		}
	}()
	var wait sync.WaitGroup
	for i := range n {
		wait.Go(func() {
			var got int
			if err := c.Execute(testenv.Context(t), "echo", i, &got); err != nil || got != i {
				t.Errorf("echo %d: %d, %v", i, got, err)
			}
		})
	}
	wait.Wait()
	mu.Lock()
	defer mu.Unlock()
	if len(events) != n || events[0] != "E0" || events[n-1] != fmt.Sprint("E", n-1) {
		t.Errorf("%d events: %v", len(events), events)
	}
}

func TestLostConnection(t *testing.T) {
	c, p := connect(t, nil)
	go func() {
		p.hear(t)
		p.Close()
	}()
	if err := c.Execute(testenv.Context(t), "stop", nil, nil); !fault.Is(err, fault.Unavailable) {
		t.Errorf("cut while waiting: %v", err)
	}
	<-c.Done()
	if err := c.Execute(testenv.Context(t), "stop", nil, nil); !fault.Is(err, fault.Unavailable) {
		t.Errorf("after the cut: %v", err)
	}
}

func TestClose(t *testing.T) {
	c, _ := connect(t, nil)
	got := make(chan error)
	go func() { got <- c.Execute(testenv.Context(t), "stop", nil, nil) }()
	c.Close()
	c.Close()
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Errorf("command during close: %v", err)
	}
}

func TestContext(t *testing.T) {
	c, p := connect(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	go func() { got <- c.Execute(ctx, "slow", nil, nil) }()
	slow := p.hear(t)
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	// The connection is still good, and the late answer is for nobody.
	go func() {
		p.say(fmt.Sprintf(`{"return": "late", "id": %d}`, slow.ID))
		p.say(fmt.Sprintf(`{"return": "good", "id": %d}`, p.hear(t).ID))
	}()
	var s string
	if err := c.Execute(testenv.Context(t), "next", nil, &s); err != nil || s != "good" {
		t.Errorf("next command: %q, %v", s, err)
	}
}

// TestDeafPeer fills the socket of a peer that reads nothing.
func TestDeafPeer(t *testing.T) {
	c, _ := connect(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	big := strings.Repeat("x", 100<<10)
	results := make(chan error, 40)
	for range cap(results) {
		go func() { results <- c.Execute(ctx, "x", big, nil) }()
	}
	cancel()
	for range cap(results) {
		if err := <-results; !errors.Is(err, context.Canceled) && !fault.Is(err, fault.Unavailable) {
			t.Errorf("deaf peer: %v", err)
		}
	}
}

func TestHostileGreeting(t *testing.T) {
	for name, words := range map[string]string{
		"nothing":   "",
		"no JSON":   "hello\n",
		"no object": "[1]\n",
		"an event":  `{"event": "X"}` + "\n",
		"half":      greeting,
		"endless":   strings.Repeat("x", 2<<20),
		"an answer": `{"return": {}, "id": 1}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			conn, p := pair(t)
			go func() {
				p.Write([]byte(words))
				p.Close()
			}()
			if c, err := qmp.New(testenv.Context(t), conn, nil); err == nil {
				c.Close()
				t.Error("it was accepted")
			}
			if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is open: %v", err)
			}
		})
	}
}

func TestSilentPeer(t *testing.T) {
	conn, _ := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := qmp.New(ctx, conn, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("silent peer: %v", err)
	}
}

func TestHostileLine(t *testing.T) {
	for name, words := range map[string]string{
		"no JSON":  "}{\n",
		"odd id":   `{"return": 1, "id": "a"}` + "\n",
		"too long": `{"return": "` + strings.Repeat("x", 2<<20) + `"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, p := connect(t, nil)
			go func() {
				p.hear(t)
				p.Write([]byte(words))
			}()
			if err := c.Execute(testenv.Context(t), "x", nil, nil); !fault.Is(err, fault.Unavailable) {
				t.Errorf("got %v", err)
			}
		})
	}
}
