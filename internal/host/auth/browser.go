package auth

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/hutch-run/hutch/internal/fault"
)

// guard refuses what a web page makes a browser send to a hutchd that asks for
// no token. Two ways lead a foreign page here, and both are closed:
//
//   - It addresses this host from its own origin. Browsers tell so by
//     Sec-Fetch-Site or Origin, which scripts can't forge. Programs send
//     neither. Unlike for a web site, reading is refused as well as writing,
//     WebSockets included.
//   - Its own name is made to resolve to a loopback address (DNS rebinding), so
//     that the browser takes hutchd for the page's own server. Then Host is that
//     name, and not one that we answer to.
//
// CONNECT is left alone: pages can't send it, and its target is no name of ours.
func (a *Authenticator) guard(r *http.Request) error {
	if r.Method == http.MethodConnect {
		return nil
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok && local.Network() != "unix" && !a.ownName(r.Host) {
		return fault.New(fault.Denied, "host %q is not a name of this hutchd; use a loopback address, localhost or the configured domain", clip(r.Host))
	}
	strict := *r
	strict.Method = http.MethodPost // the std rules let every GET pass
	if err := a.origins.Check(&strict); err != nil && !a.crossOrigin(r) {
		return fault.New(fault.Denied, "a web page of another origin (%q) may not drive hutchd", clip(r.Header.Get("Origin")))
	}
	return nil
}

// ownName reports whether the Host header host is one that only callers on
// this host, or of the configured domain, use.
func (a *Authenticator) ownName(host string) bool {
	name := strings.ToLower(strings.TrimSuffix(HostName(host), "."))
	if addr, err := netip.ParseAddr(name); err == nil {
		return addr.Unmap().IsLoopback()
	}
	for _, own := range []string{DefaultDomain, a.domain} {
		if name == own || strings.HasSuffix(name, "."+own) {
			return true
		}
	}
	return false
}

// HostName returns the host of a "host" or "host:port" header value, without
// the brackets of IPv6.
func HostName(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
}

// clip shortens what a stranger sent for an error message.
func clip(s string) string {
	const limit = 100
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
