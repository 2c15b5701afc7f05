package guestconn

import (
	"context"
	"net"
	"net/http"
	"slices"

	"github.com/hutch-run/hutch/internal/link"
)

// Limits of what a guest may make its host hold for HTTP.
const (
	maxHeader       = 256 << 10
	receivePerCall  = 256 << 10
	receivePerGuest = 16 << 20 // so that a few calls that nobody reads don't stop the others
)

// baseURL is what our own requests name. Its host means nothing: there is one
// place to go.
const baseURL = "http://guest.invalid"

// transport carries HTTP/2 over streams of the link, one connection per stream
// and, as long as that lives, one stream for all requests.
type transport struct {
	http *http.Transport
}

func newTransport(c *Conn) *transport {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &transport{&http.Transport{
		Protocols: &p,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			// net/http lets a dial outlive its request, for the benefit of the
			// next one. Towards a paused guest such dials would pile up.
			if req, ok := ctx.Value(requestKey{}).(context.Context); ok {
				var cancel context.CancelCauseFunc
				ctx, cancel = context.WithCancelCause(ctx)
				defer cancel(nil)
				defer context.AfterFunc(req, func() { cancel(context.Cause(req)) })()
			}
			s, err := c.open(ctx, func(s *link.Session) (*link.Stream, error) { return s.OpenAPI(ctx) })
			if err != nil {
				return nil, err
			}
			return s, nil
		},
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
		HTTP2: &http.HTTP2Config{
			MaxReceiveBufferPerStream:     receivePerCall,
			MaxReceiveBufferPerConnection: receivePerGuest,
			// A piece of output with its envelope in one frame, not three.
			MaxReadFrameSize: 64 << 10,
		},
	}}
}

// requestKey is the context key of the context of the request that a dial is
// for.
type requestKey struct{}

func (t *transport) close() { t.http.CloseIdleConnections() }

// RoundTrip implements http.RoundTripper. Whatever host the URL names, the
// request goes to the guest, and the Host header stays as it is. A request that
// is safe to repeat is tried once more when the connection broke before an
// answer came.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	out := r.Clone(context.WithValue(r.Context(), requestKey{}, r.Context()))
	if out.Host == "" {
		out.Host = r.URL.Host
	}
	out.URL.Scheme, out.URL.Host = "http", "guest.invalid"
	res, err := t.http.RoundTrip(out)
	if err == nil || r.Context().Err() != nil || !repeatable(r) {
		return res, err
	}
	again := out.Clone(out.Context())
	if r.GetBody != nil {
		body, berr := r.GetBody()
		if berr != nil {
			return nil, err
		}
		again.Body = body
	}
	return t.http.RoundTrip(again)
}

// repeatable tells whether sending r twice does no more than sending it once.
func repeatable(r *http.Request) bool {
	if r.Body != nil && r.Body != http.NoBody && r.GetBody == nil {
		return false
	}
	return slices.Contains([]string{"", http.MethodGet, http.MethodHead, http.MethodOptions}, r.Method)
}
