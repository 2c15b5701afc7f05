package proxy

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"

	"github.com/hutch-run/hutch/internal/host/relay"
)

// forward carries an HTTP request to a guest API or to a port, and its answer
// or the connection it turns into back.
func (p *Proxy) forward(w http.ResponseWriter, r *http.Request, v visit) {
	host := "guest" // for its own APIs; the guest's transport dials nothing else
	transport := http.RoundTripper(nil)
	if v.kind == guestAPI {
		transport = v.guest.Transport()
	} else {
		host = r.Host // what the server in the guest compares Origin with
		transport = portTransport(v)
	}
	out, err := v.outURL("guest", r.URL.RawQuery)
	if err != nil {
		p.refuse(w, r, err, "")
		return
	}
	rp := httputil.ReverseProxy{
		Transport:     transport,
		FlushInterval: -1,
		BufferPool:    &p.buffers,
		ErrorLog:      slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL = out
			pr.Out.Host = host
			if v.body != nil {
				pr.Out.Body = v.body
			}
			scrubRequest(pr, v.target)
		},
		ModifyResponse: func(res *http.Response) error {
			scrubResponse(res, v.target)
			v.body.Answered(res.Header)
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) { p.lost(w, r, v, err) },
	}
	rp.ServeHTTP(relay.Final(w), r)
}

// portTransport speaks HTTP/1.1 to one port, on one connection for one request.
func portTransport(v visit) http.RoundTripper {
	return relay.Transport(func(ctx context.Context) (net.Conn, error) {
		conn, err := v.guest.DialPort(ctx, v.port)
		if err != nil {
			return nil, &dialError{err}
		}
		return conn, nil
	})
}

// cleanTrailer takes what a guest may not say off the trailer, which is there
// once the body is closed.
type cleanTrailer struct {
	io.ReadCloser
	res *http.Response
}

// Close implements io.Closer.
func (c *cleanTrailer) Close() error {
	err := c.ReadCloser.Close()
	scrubOwn(c.res.Trailer)
	c.res.Trailer.Del("Set-Cookie")
	return err
}
