package guestconn

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestDialDocker(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	_, err := c.DialDocker(ctx)
	var status *link.StatusError
	if !fault.Is(err, fault.Unavailable) || !errors.As(err, &status) || status.Status != link.StatusRefused {
		t.Errorf("no dockerd: %v", err)
	}
	l, err := net.Listen("unix", a.docker)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		peer, err := l.Accept()
		if err != nil {
			return
		}
		defer peer.Close()
		in, _ := io.ReadAll(peer)
		_, _ = peer.Write(append([]byte("heard "), in...))
	})
	conn, err := c.DialDocker(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = conn.Write([]byte("ping"))
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(conn); err != nil || string(b) != "heard ping" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestDialUDP(t *testing.T) {
	testenv.CheckGoroutines(t)
	ctx, a := testenv.Context(t), startAgent(t)
	c := connectTo(t, a)
	echo, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer echo.Close()
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(b[:n], from)
		}
	})
	flow, err := c.DialUDP(ctx, uint16(echo.LocalAddr().(*net.UDPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	defer flow.Close()
	_ = flow.SetReadDeadline(time.Now().Add(20 * time.Second))
	for _, m := range []string{"one", "", "another"} {
		_, _ = flow.Write([]byte(m))
		b := make([]byte, 2048)
		if n, err := flow.Read(b); err != nil || string(b[:n]) != m {
			t.Errorf("%q came back as %q, %v", m, b[:n], err)
		}
	}
	a.cut()
	if _, err := flow.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a flow whose link broke: %v", err)
	}
	if _, err := c.DialUDP(ctx, 0); !fault.Is(err, fault.Invalid) {
		t.Errorf("port 0: %v, want invalid", err)
	}
}

// TestOldAgentsAreTold dials an agent that does not know these targets.
func TestOldAgentsAreTold(t *testing.T) {
	denied := &link.StatusError{Status: link.StatusDenied, Target: "unix:docker"}
	if err := tooOld(fault.As(fault.Denied, denied), "Docker's socket"); !fault.Is(err, fault.Unimplemented) {
		t.Errorf("%v (%v)", err, fault.Of(err))
	}
	refused := fault.As(fault.Unavailable, &link.StatusError{Status: link.StatusRefused})
	if err := tooOld(refused, "Docker's socket"); !errors.Is(err, refused) {
		t.Errorf("a closed socket is told as %v", err)
	}
}
