package dockersock

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"

	"github.com/hutch-run/hutch/internal/host/relay"
)

// ServeHTTP carries one request to the guest's daemon, and its answer or the
// connection that it turns into back.
func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel, body := relay.Caller(w, r)
	defer cancel()
	defer context.AfterFunc(d.open, cancel)()
	r = r.WithContext(ctx)
	leave, err := d.enter()
	if err != nil {
		d.refuse(w, r, err)
		return
	}
	defer leave()
	g, done, err := d.s.p.Sandboxes.Use(ctx, d.id)
	if err != nil {
		d.refuse(w, r, err)
		return
	}
	defer done()
	conn, err := d.dial(ctx, g)
	if err != nil {
		d.lost(w, r, err)
		return
	}
	defer conn.Close()
	if hijacks(r) {
		d.hijack(w, r, conn)
		return
	}
	started := func(bool) {}
	if c, ok := startOf(r); ok {
		if started, err = d.reserve(ctx, g, c); err != nil {
			d.refuse(w, r, err)
			return
		}
	}
	d.forward(w, r, conn, body, started)
}

// forward carries a request that is answered and nothing more. worked hears, once,
// whether the daemon did it.
func (d *door) forward(w http.ResponseWriter, r *http.Request, conn net.Conn, body *relay.Body, worked func(bool)) {
	ok := false
	defer func() { worked(ok) }() // also when the caller went away
	if r.ContentLength != 0 {
		// Let the answer begin before the request has ended. Connections of this
		// server can.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	rp := httputil.ReverseProxy{
		Transport:     relay.Transport(once(conn)),
		FlushInterval: -1,
		BufferPool:    &d.s.buffers,
		ErrorLog:      slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
		Rewrite: func(pr *httputil.ProxyRequest) {
			in := pr.In.URL
			pr.Out.URL = &url.URL{Scheme: "http", Host: "docker", Path: in.Path, RawPath: in.RawPath, RawQuery: in.RawQuery}
			pr.Out.Host = pr.In.Host
			if body != nil {
				pr.Out.Body = body
			}
		},
		ModifyResponse: func(res *http.Response) error {
			ok = res.StatusCode < http.StatusBadRequest
			body.Answered(res.Header)
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) { d.lost(w, r, err) },
	}
	rp.ServeHTTP(relay.Final(w), r)
}

// once returns a dial that gives conn to the first who asks.
func once(conn net.Conn) func(context.Context) (net.Conn, error) {
	first := make(chan net.Conn, 1)
	first <- conn
	return func(context.Context) (net.Conn, error) {
		select {
		case c := <-first:
			return c, nil
		default:
			return nil, errors.New("a request has one connection")
		}
	}
}
