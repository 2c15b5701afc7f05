package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/hutch-run/hutch/internal/testenv"
	"github.com/hutch-run/hutch/test/harness"
)

// TestStreamsToAServerInAGuest speaks with a server in a guest the ways that
// are no request with an answer: WebSockets and raw connections.
func TestStreamsToAServerInAGuest(t *testing.T) {
	d := harness.Start(t, harness.Options{TCP: true})
	id := d.Create("-m", "128")
	putInside(t, d, id, buildInside(t))
	d.Hutch("exec", id, "--", "sh", "-c", "inside serve >/dev/null 2>&1 &")
	harness.Eventually(t, 30*time.Second, func() error {
		return errors.Join(echoesOnce(dial{"tcp", d.TCP}, id+":9001"), echoesOnce(dial{"tcp", d.TCP}, id+":9000"))
	})
	t.Run("WebSocket by path", func(t *testing.T) {
		speak(t, "ws://"+d.TCP+"/sandboxes/"+id+"/ports/9000/echo", "")
	})
	t.Run("WebSocket by host name", func(t *testing.T) {
		speak(t, "ws://"+d.TCP+"/echo", "9000-"+id+".localhost")
	})
	for name, to := range map[string]dial{"TCP": {"tcp", d.TCP}, "unix socket": {"unix", d.Socket}} {
		t.Run("CONNECT over "+name, func(t *testing.T) {
			t.Run("8 MiB there and back at once", func(t *testing.T) { to.echo(t, id+":9001", 8<<20) })
			t.Run("the caller ends first", func(t *testing.T) { to.echo(t, id+":9001", 0) })
			t.Run("the guest ends first", func(t *testing.T) { to.outlast(t, id, "http://"+d.TCP) })
		})
	}
}

// speak has a conversation of frames of all kinds and lengths over url, with
// another Host than the url's unless that is empty.
func speak(t *testing.T, url, host string) {
	ctx, cancel := context.WithTimeout(testenv.Context(t), time.Minute)
	defer cancel()
	c, res, err := websocket.Dial(ctx, url, &websocket.DialOptions{Host: host, Subprotocols: []string{"other", "e2e"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)
	if c.Subprotocol() != "e2e" {
		t.Errorf("subprotocol %q, answered %v", c.Subprotocol(), res.Header)
	}
	if kind, b, err := c.Read(ctx); err != nil || kind != websocket.MessageText || string(b) != "hello from e2e" {
		t.Fatalf("the guest says %v %q, %v", kind, b, err)
	}
	for _, kind := range []websocket.MessageType{websocket.MessageText, websocket.MessageBinary} {
		// The lengths where the form of a frame's head changes, and a large one.
		for _, n := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
			sent := bytes.Repeat([]byte("x"), n)
			if kind == websocket.MessageBinary {
				sent = random(n)
			}
			if err := c.Write(ctx, kind, sent); err != nil {
				t.Fatalf("%s of %d bytes: %v", kind, n, err)
			}
			if back, b, err := c.Read(ctx); err != nil || back != kind || !bytes.Equal(b, sent) {
				t.Fatalf("%s of %d bytes came back as %s of %d, %v", kind, n, back, len(b), err)
			}
		}
	}
	if err := c.Write(ctx, websocket.MessageText, []byte("bye")); err != nil {
		t.Fatal(err)
	}
	_, _, err = c.Read(ctx)
	var end websocket.CloseError
	if !errors.As(err, &end) || end.Code != 4001 || end.Reason != "as you wish" {
		t.Errorf("the conversation ended with %v", err)
	}
}

// dial says where hutchd listens.
type dial struct{ network, address string }

// tunnel is a raw connection to a port of a guest.
type tunnel struct {
	net.Conn
	r *bufio.Reader // what came behind the answer is in it
}

func (u *tunnel) Read(b []byte) (int, error) { return u.r.Read(b) }

func (u *tunnel) closeWrite() error { return u.Conn.(interface{ CloseWrite() error }).CloseWrite() }

func (to dial) connect(target string) (*tunnel, error) {
	c, err := net.Dial(to.network, to.address)
	if err != nil {
		return nil, err
	}
	u := &tunnel{c, bufio.NewReader(c)}
	err = c.SetDeadline(time.Now().Add(2 * time.Minute))
	if err == nil {
		_, err = fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target)
	}
	if err == nil {
		var res *http.Response
		if res, err = http.ReadResponse(u.r, nil); err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("CONNECT %s: %s", target, res.Status)
		}
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return u, nil
}

// echoesOnce reports whether target can be connected to.
func echoesOnce(to dial, target string) error {
	u, err := to.connect(target)
	if err != nil {
		return err
	}
	return u.Close()
}

// echo sends n bytes and the end while it reads them back, and the end.
func (to dial) echo(t *testing.T, target string, n int) {
	u, err := to.connect(target)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	sent := random(n)
	wrote := make(chan error, 1)
	go func() {
		_, err := u.Write(sent)
		wrote <- errors.Join(err, u.closeWrite())
	}()
	back, err := io.ReadAll(u)
	if err := <-wrote; err != nil {
		t.Errorf("send: %v", err)
	}
	if err != nil || digest(back) != digest(sent) {
		t.Errorf("sent %d bytes, %d came back, %v", n, len(back), err)
	}
}

// outlast reads the guest's end and sends 8 MiB after it.
func (to dial) outlast(t *testing.T, id, base string) {
	u, err := to.connect(id + ":9002")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if said, err := io.ReadAll(u); err != nil || string(said) != "farewell" {
		t.Fatalf("the guest says %q, %v", said, err)
	}
	sent := random(8 << 20)
	if _, err := u.Write(sent); err != nil {
		t.Fatalf("send after the guest's end: %v", err)
	}
	if err := u.closeWrite(); err != nil {
		t.Fatal(err)
	}
	res, err := http.Get(base + "/sandboxes/" + id + "/ports/9000/sum")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if sum, err := io.ReadAll(res.Body); err != nil || string(sum) != digest(sent) {
		t.Errorf("the guest got %q, want %q, %v", sum, digest(sent), err)
	}
}
