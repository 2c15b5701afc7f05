package share

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/hutch-run/hutch/internal/host/jail"
	"github.com/hutch-run/hutch/internal/proc"
)

// server is one daemon.
type server struct {
	*proc.Process
	jail *jail.Jail
	cell string
}

// Why tells how the daemon ended.
func (s *server) Why() string {
	why := "virtiofsd " + s.Exit().String()
	if words := s.LastWords(); words != "" {
		why += ": " + words
	}
	return why
}

// Kill ends the daemon and removes its jail.
func (s *server) Kill(ctx context.Context) error {
	if err := s.Process.Kill(ctx); err != nil {
		return err
	}
	return errors.Join(s.Process.Close(), s.jail.Remove(ctx, s.cell))
}

// connect makes a listening socket and the one connection to it that there will
// ever be: it has a name only meanwhile, in a directory of its own, so that
// nobody else can be first.
func connect(ctx context.Context, at Place) (listener, conn *os.File, err error) {
	dir := filepath.Join(at.Dir, Tag(at.Index))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	defer func() { _ = os.Remove(dir) }() // or with at.Dir
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	defer l.Close() // and with it its name
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to socket: %w", err)
	}
	defer c.Close()
	if listener, err = l.File(); err != nil {
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	if conn, err = c.(*net.UnixConn).File(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make socket: %w", err), listener.Close())
	}
	return listener, conn, nil
}
