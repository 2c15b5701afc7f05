package vmmtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"github.com/hutch-run/hutch/internal/host/vmm"
)

// resend is after what time an unanswered request is sent again: what is sent
// while the guest opens its port anew may be lost, as on any driver.
const resend = time.Second

// Guest is a connection to the suite's guest.
type Guest struct {
	net.Conn
	lines chan string // closed at the end of the connection
}

// DialGuest connects to the guest of v. The caller closes it.
func DialGuest(ctx context.Context, v vmm.VM) (*Guest, error) {
	conn, err := v.DialLink(ctx)
	if err != nil {
		return nil, err
	}
	g := &Guest{Conn: conn, lines: make(chan string, 64)}
	go func() {
		defer close(g.lines)
		in := bufio.NewScanner(conn)
		in.Buffer(make([]byte, 4096), 1<<20)
		for in.Scan() {
			select {
			case g.lines <- in.Text():
			default: // answers that nobody waits for any more
			}
		}
	}()
	return g, nil
}

// Ask sends a request until it is answered. It is io.EOF when the connection
// ends first.
func (g *Guest) Ask(ctx context.Context, request string) (string, error) {
	token := fmt.Sprintf("t%016x", rand.Uint64())
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			if _, err := fmt.Fprintf(g, "%s %s\n", token, request); err != nil {
				return "", fmt.Errorf("ask guest %.60q: %w", request, err)
			}
			again.Reset(resend)
		case line, ok := <-g.lines:
			if !ok {
				return "", fmt.Errorf("ask guest %.60q: %w", request, io.EOF)
			}
			// A torn line of a connection before may stand in front of it.
			if _, answer, ok := strings.Cut(line, token+" "); ok {
				return answer, nil
			}
		case <-ctx.Done():
			return "", fmt.Errorf("ask guest %.60q: %w", request, ctx.Err())
		}
	}
}
