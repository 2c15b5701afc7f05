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
	worked := nothing
	if c, ok := startOf(r); ok {
		worked, err = d.reserve(ctx, g, c)
	} else if version, ok := createOf(r); ok && body != nil {
		worked, err = d.choose(r, g, version, body)
		body = nil // it was read
	}
	if err != nil {
		d.refuse(w, r, err)
		return
	}
	d.forward(w, r, conn, body, worked)
}

// forward carries a request that is answered and nothing more. worked hears, once
// and before the caller does, whether the daemon did it.
func (d *door) forward(w http.ResponseWriter, r *http.Request, conn net.Conn, body *relay.Body, worked func(bool)) {
	told := false
	tell := func(ok bool) {
		if !told {
			told = true
			worked(ok)
		}
	}
	defer tell(false) // also when the caller went away
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
			tell(res.StatusCode < http.StatusBadRequest)
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
