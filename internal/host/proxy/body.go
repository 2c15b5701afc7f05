package proxy

import (
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// errLetGo is what a body reads as that the transport let go of.
var errLetGo = errors.New("request body is closed")

// callerBody is the body of a request on its way to a guest. Unlike the
// server's own, its Close ends a Read that waits for the caller: transports
// close a body when the guest answers without wanting the rest, and then wait
// for the Read to return, while the caller may have nothing to send before it
// sees that answer. (ReverseProxy's wrapper makes Close do nothing at all.)
type callerBody struct {
	body  io.ReadCloser
	http1 *http.ResponseController // nil over HTTP/2

	mu      sync.Mutex
	reading bool // guarded by mu
	closed  bool // guarded by mu
}

func newCallerBody(w http.ResponseWriter, r *http.Request) io.ReadCloser {
	if r.Body == nil || r.ContentLength == 0 {
		return nil
	}
	b := &callerBody{body: r.Body}
	if r.ProtoMajor == 1 {
		b.http1 = http.NewResponseController(w)
	}
	return b
}

// Read implements io.Reader.
func (b *callerBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return 0, errLetGo
	}
	b.reading = true
	b.mu.Unlock()
	n, err := b.body.Read(p)
	b.mu.Lock()
	b.reading = false
	b.mu.Unlock()
	return n, err
}

// Close implements io.Closer. It never waits for the caller.
func (b *callerBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	switch {
	case !b.reading:
		return nil // the server knows best what to do with the rest
	case b.http1 != nil:
		// The connection serves no further request, which it could not anyway.
		return b.http1.SetReadDeadline(time.Unix(1, 0))
	}
	return b.body.Close()
}
