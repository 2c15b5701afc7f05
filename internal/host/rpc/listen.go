package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hutch-run/hutch/internal/undo"
)

// socketMode is the mode of a unix socket: it says who may drive hutchd.
const socketMode = 0o660

// maxSocketPath is the longest path of a unix socket, in bytes.
const maxSocketPath = 107

// Address is where hutchd listens: a unix socket, or a TCP host and port.
type Address struct {
	Path string // of a unix socket; empty: TCP
	Host string // name or address; empty: all addresses
	Port uint16 // 0: any free one
}

// ParseAddress reads "unix:PATH" or "tcp:HOST:PORT"; "unix://PATH" and
// "tcp://HOST:PORT" are the same. An IPv6 address stands in brackets.
func ParseAddress(s string) (Address, error) {
	network, rest, ok := strings.Cut(s, ":")
	rest = strings.TrimPrefix(rest, "//")
	switch {
	case ok && network == "unix":
		if !filepath.IsAbs(rest) {
			return Address{}, fmt.Errorf("listen address %q: the socket needs an absolute path, as in unix:/run/hutch/hutchd.sock", s)
		}
		if len(rest) > maxSocketPath {
			return Address{}, fmt.Errorf("listen address %q: a socket path has at most %d bytes", s, maxSocketPath)
		}
		return Address{Path: filepath.Clean(rest)}, nil
	case ok && network == "tcp":
		host, port, err := net.SplitHostPort(rest)
		if err != nil {
			return Address{}, fmt.Errorf("listen address %q: use tcp:HOST:PORT, as in tcp:127.0.0.1:7777", s)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return Address{}, fmt.Errorf("listen address %q: %q is no port number", s, port)
		}
		return Address{Host: host, Port: uint16(n)}, nil
	}
	return Address{}, fmt.Errorf("listen address %q: use unix:PATH or tcp:HOST:PORT", s)
}

// String is the form that ParseAddress reads.
func (a Address) String() string {
	if a.Path != "" {
		return "unix:" + a.Path
	}
	return "tcp:" + net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

// ListenParams is what Listen needs.
type ListenParams struct {
	Address Address
	// Group owns a unix socket, by name or number. Empty: that of the process.
	Group string
	// TLS is used by TCP listeners; nil: plain.
	TLS *tls.Config
	// HasTokens says that callers over TCP need a token.
	HasTokens bool
}

// Listen opens a listener. A unix socket has mode 0660; one that is left over
// is replaced only when nobody answers on it. TCP beyond loopback needs TLS
// and tokens.
func Listen(ctx context.Context, p ListenParams) (net.Listener, error) {
	if p.Address.Path != "" {
		return listenUnix(ctx, p.Address.Path, p.Group)
	}
	return listenTCP(ctx, p)
}

func listenTCP(ctx context.Context, p ListenParams) (net.Listener, error) {
	addr, err := resolveLocal(ctx, p.Address.Host)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", p.Address, err)
	}
	if !addr.IsLoopback() {
		switch {
		case p.TLS == nil && !p.HasTokens:
			return nil, fmt.Errorf("listen on %s: beyond loopback, TLS and a token file are needed; configure both, or listen on 127.0.0.1 or a unix socket", p.Address)
		case p.TLS == nil:
			return nil, fmt.Errorf("listen on %s: beyond loopback, TLS is needed; configure a certificate and key", p.Address)
		case !p.HasTokens:
			return nil, fmt.Errorf("listen on %s: beyond loopback, tokens are needed; configure a token file", p.Address)
		}
	}
	config := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 4,
	}}
	l, err := config.Listen(ctx, "tcp", net.JoinHostPort(addr.String(), strconv.Itoa(int(p.Address.Port))))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", p.Address, err)
	}
	if p.TLS != nil {
		l = tls.NewListener(l, p.TLS)
	}
	return l, nil
}

// resolveLocal returns the address that host stands for; a name for several
// must stand for loopback ones only, or be given as an address.
func resolveLocal(ctx context.Context, host string) (netip.Addr, error) {
	if host == "" {
		return netip.IPv6Unspecified(), nil // of both families
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, err
	}
	if len(addrs) == 0 {
		return netip.Addr{}, fmt.Errorf("%s has no address", host)
	}
	best := addrs[0].Unmap()
	for _, a := range addrs {
		a = a.Unmap()
		if a.IsLoopback() != best.IsLoopback() {
			return netip.Addr{}, fmt.Errorf("%s stands for %v; give the address to listen on", host, addrs)
		}
		if a.Is4() && !best.Is4() {
			best = a // what clients that know no IPv6 use too
		}
	}
	return best, nil
}

func listenUnix(ctx context.Context, path, group string) (net.Listener, error) {
	gid, err := groupID(group)
	if err != nil {
		return nil, fmt.Errorf("listen on unix:%s: %w", path, err)
	}
	if err := clearStale(ctx, path); err != nil {
		return nil, fmt.Errorf("listen on unix:%s: %w", path, err)
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		// The mode of the socket before bind is the one that the file gets, less
		// the umask: there is no instant at which others may connect.
		var chmod error
		if err := raw.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), socketMode) }); err != nil {
			return err
		}
		return chmod
	}}
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on unix:%s: %w", path, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	err = os.Lchown(path, -1, gid)
	if err == nil {
		err = os.Chmod(path, socketMode)
	}
	st, statErr := os.Lstat(path)
	if err = errors.Join(err, statErr); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on unix:%s: %w", path, err), l.Close(), os.Remove(path))
	}
	return &socketListener{Listener: l, path: path, made: st}, nil
}

// errAnswered says that a socket is in use.
var errAnswered = errors.New("another process answers there; is hutchd running already?")

// clearStale removes a socket that nobody answers on. Anything else in its
// place stays, and is an error.
func clearStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return errors.New("there is something else than a socket; move it away")
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		return errors.Join(errAnswered, conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("find out whether somebody answers: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the stale socket: %w", err)
	}
	return nil
}

// groupID returns the number of a group, -1 for none.
func groupID(group string) (int, error) {
	if group == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("group of the socket: %w", err)
	}
	return strconv.Atoi(g.Gid)
}

// socketListener removes its socket on Close, unless another took its place.
type socketListener struct {
	net.Listener
	path string
	made fs.FileInfo

	once sync.Once
	err  error
}

// Close implements net.Listener.
func (s *socketListener) Close() error {
	s.once.Do(func() {
		s.err = s.Listener.Close()
		st, err := os.Lstat(s.path)
		if err != nil || !os.SameFile(st, s.made) {
			return
		}
		// The inode may be a used one: a successor answers, what is ours does not.
		ctx, cancel := undo.Detach(context.Background())
		defer cancel()
		if err := clearStale(ctx, s.path); !errors.Is(err, errAnswered) {
			s.err = errors.Join(s.err, err)
		}
	})
	return s.err
}
