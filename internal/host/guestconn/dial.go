package guestconn

import (
	"context"
	"errors"
	"net"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
)

// DialPort implements Guest. The connection has CloseWrite. A port where nothing
// listens is Unavailable, with a *link.StatusError in the chain.
func (c *Conn) DialPort(ctx context.Context, port uint16) (net.Conn, error) {
	if port == 0 {
		return nil, fault.BadField("port", "must be 1 to 65535")
	}
	s, err := c.open(ctx, func(s *link.Session) (*link.Stream, error) { return s.OpenTCP(ctx, port) })
	if err != nil {
		return nil, err
	}
	return s, nil
}

// DialDocker implements Guest. Where no daemon listens it is Unavailable, with a
// *link.StatusError in the chain.
func (c *Conn) DialDocker(ctx context.Context) (net.Conn, error) {
	s, err := c.open(ctx, func(s *link.Session) (*link.Stream, error) { return s.OpenUnix(ctx, link.SocketDocker) })
	if err != nil {
		return nil, tooOld(err, "Docker's socket")
	}
	return s, nil
}

// DialUDP implements Guest.
func (c *Conn) DialUDP(ctx context.Context, port uint16) (net.Conn, error) {
	if port == 0 {
		return nil, fault.BadField("port", "must be 1 to 65535")
	}
	var flow *link.Datagrams
	_, err := c.open(ctx, func(s *link.Session) (_ *link.Stream, err error) {
		if flow, err = s.OpenUDP(ctx, port); err != nil {
			return nil, err
		}
		return flow.Stream, nil
	})
	if err != nil {
		return nil, tooOld(err, "UDP ports")
	}
	return flow, nil
}

// tooOld says of an agent that denies what this build's offers why it does.
func tooOld(err error, what string) error {
	var status *link.StatusError
	if errors.As(err, &status) && status.Status == link.StatusDenied {
		return fault.New(fault.Unimplemented,
			"the guest agent of this sandbox is older than hutchd and does not offer %s: make the sandbox anew (from a template or snapshot that was not kept from before)", what)
	}
	return err
}
