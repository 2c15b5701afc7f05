package cli

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"
)

func (a *App) portCommand() *cobra.Command {
	var address string
	c := &cobra.Command{
		Use:   "port SANDBOX [LOCAL:]PORT...",
		Short: "Forward local TCP ports to ports of a sandbox, until interrupted; or list published ones",
		Long: "Forward local TCP ports to ports of a sandbox, until interrupted.\n\n" +
			"What containers and Kubernetes Services in a sandbox publish is open on the host\n" +
			"of hutchd without this command: hutch port ls lists it.",
		Example: "  hutch port sb-12 8080\n  hutch port sb-12 9000:80 5432\n  hutch port ls sb-12",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, id, err := a.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.forward(cmd.Context(), cl, id, address, args[1:])
		},
	}
	c.Flags().StringVar(&address, "address", "127.0.0.1", "local address to listen on")
	c.AddCommand(a.portLsCommand())
	return c
}

// forward listens on the local ports and tunnels until ctx ends.
func (a *App) forward(ctx context.Context, c *client, id, address string, specs []string) error {
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, spec := range specs {
		local, port, err := parsePorts(spec)
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", net.JoinHostPort(address, local))
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
		fmt.Fprintf(a.Out, "%s -> %s:%d\n", l.Addr(), id, port)
		wg.Go(func() { a.acceptLoop(ctx, c, l, fmt.Sprintf("%s:%d", id, port)) })
	}
	<-ctx.Done()
	for _, l := range listeners {
		l.Close()
	}
	return nil
}

// parsePorts reads [LOCAL:]PORT. LOCAL may be 0: any free port.
func parsePorts(s string) (local string, port uint16, err error) {
	local, guest, ok := strings.Cut(s, ":")
	if !ok {
		guest = local
	}
	p, err := strconv.ParseUint(guest, 10, 16)
	if err != nil || p == 0 {
		return "", 0, fmt.Errorf("port %q: want PORT or LOCAL:PORT", s)
	}
	if _, err := strconv.ParseUint(local, 10, 16); err != nil {
		return "", 0, fmt.Errorf("port %q: want PORT or LOCAL:PORT", s)
	}
	return local, uint16(p), nil
}

// acceptLoop tunnels what connects to l to authority, until l is closed.
func (a *App) acceptLoop(ctx context.Context, c *client, l net.Listener, authority string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		local, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			if err := c.tunnel(ctx, local, authority); err != nil {
				fmt.Fprintln(a.Err, "hutch:", err)
			}
		})
	}
}

// tunnel carries one connection through hutchd to what authority names in a
// sandbox.
func (c *client) tunnel(ctx context.Context, local net.Conn, authority string) error {
	defer local.Close()
	remote, err := c.connect(ctx, authority)
	if err != nil {
		return err
	}
	defer remote.Close()
	stop := context.AfterFunc(ctx, func() { local.Close(); remote.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { copyHalf(remote, local) })
	copyHalf(local, remote)
	wg.Wait()
	return nil
}

// copyHalf copies one direction and hands its end on.
func copyHalf(to, from net.Conn) {
	_, err := io.Copy(to, from)
	half, ok := to.(interface{ CloseWrite() error })
	if err != nil || !ok || half.CloseWrite() != nil {
		to.Close()
	}
}

// connect opens a raw connection by HTTP CONNECT.
func (c *client) connect(ctx context.Context, authority string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, c.target.network, c.target.address)
	if err != nil {
		return nil, err
	}
	if c.target.tls {
		host, _, err := net.SplitHostPort(c.target.address)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		conn = tls.Client(conn, &tls.Config{ServerName: host, NextProtos: []string{"http/1.1"}})
	}
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", authority, authority)
	if c.token != "" {
		fmt.Fprintf(conn, "Authorization: Bearer %s\r\n", c.token)
	}
	fmt.Fprint(conn, "\r\n")
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to %s: %w", authority, err), conn.Close())
	}
	if res.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("connect to %s: %w", authority, httpError(res)), conn.Close())
	}
	return &bufferedConn{Conn: conn, r: r}, nil
}

// bufferedConn reads what came right behind the answer first.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

// Read reads from the buffer, then from the connection.
func (b *bufferedConn) Read(p []byte) (int, error) { return b.r.Read(p) }

// CloseWrite ends the sending direction.
func (b *bufferedConn) CloseWrite() error {
	if half, ok := b.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return b.Close()
}
