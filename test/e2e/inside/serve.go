package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"

	"github.com/coder/websocket"
)

// What serve listens on.
const (
	webAddress   = ":9000" // HTTP: /echo is a WebSocket, /sum tells what farewell got
	echoAddress  = ":9001" // raw: all comes back, then the end does; UDP too
	leaveAddress = ":9002" // raw: says "farewell" and the end, then listens on
)

// serve serves until one of the servers fails.
func serve() error {
	sums := make(chan string, 1)
	failed := make(chan error, 4)
	for address, handle := range map[string]func(*net.TCPConn) error{
		echoAddress:  echo,
		leaveAddress: func(c *net.TCPConn) error { return leave(c, sums) },
	} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		go func() { failed <- accept(l.(*net.TCPListener), handle) }()
	}
	p, err := net.ListenPacket("udp", echoAddress)
	if err != nil {
		return err
	}
	go func() { failed <- echoDatagrams(p) }()
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", echoFrames)
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		select {
		case sum := <-sums:
			io.WriteString(w, sum)
		case <-r.Context().Done():
		}
	})
	go func() { failed <- http.ListenAndServe(webAddress, mux) }()
	return <-failed
}

func accept(l *net.TCPListener, handle func(*net.TCPConn) error) error {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := handle(c); err != nil {
				c.SetLinger(0) // a reset: no end that looks orderly
			}
		}()
	}
}

func echo(c *net.TCPConn) error {
	if _, err := io.Copy(c, struct{ io.Reader }{c}); err != nil {
		return err
	}
	return c.CloseWrite()
}

func echoDatagrams(p net.PacketConn) error {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := p.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := p.WriteTo(buf[:n], from); err != nil {
			return err
		}
	}
}

func leave(c *net.TCPConn, sums chan<- string) error {
	if _, err := io.WriteString(c, "farewell"); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, c); err != nil {
		return err
	}
	sums <- hex.EncodeToString(sum.Sum(nil))
	return nil
}

// echoFrames speaks first, sends every message back, and closes with a code of
// its own when it is told "bye".
func echoFrames(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true, Subprotocols: []string{"e2e"}})
	if err != nil {
		return // it has answered
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)
	if err := talk(r.Context(), c); err == nil {
		c.Close(4001, "as you wish")
	}
}

func talk(ctx context.Context, c *websocket.Conn) error {
	if err := c.Write(ctx, websocket.MessageText, []byte("hello from "+c.Subprotocol())); err != nil {
		return err
	}
	for {
		kind, b, err := c.Read(ctx)
		if err != nil {
			return errors.Join(errors.New("read frame"), err)
		}
		if string(b) == "bye" {
			return nil
		}
		if err := c.Write(ctx, kind, b); err != nil {
			return err
		}
	}
}
