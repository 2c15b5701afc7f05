package agent

import (
	"context"
	"net"

	"github.com/hutch-run/hutch/internal/link"
)

// dialTCP connects to a port of this machine for the host.
func (a *agent) dialTCP(ctx context.Context, port uint16) (net.Conn, error) {
	if way, ok := a.ports.Way("tcp", port); ok {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", way.String())
	}
	return link.DialLocal(ctx, port)
}

// dialUDP returns a socket that is connected to a UDP port of this machine.
func (a *agent) dialUDP(ctx context.Context, port uint16) (*net.UDPConn, error) {
	if way, ok := a.ports.Way("udp", port); ok {
		return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(way))
	}
	return link.DialLocalUDP(ctx, port)
}
