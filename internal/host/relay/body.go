package relay

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// letGoGrace is how long a caller over HTTP/1.1 that is in the middle of an
// upload may take for its next bytes once the guest wants no more.
const letGoGrace = 250 * time.Millisecond

// errLetGo is what a body reads as that the transport let go of.
var errLetGo = errors.New("request body is closed")

// Body is the body of a request on its way to a guest. Unlike the server's own,
// its Close ends a Read that waits for the caller: transports close a body when
// the guest answers without wanting the rest, and then wait for the Read to
// return, while the caller may have nothing to send before it sees that answer.
// (ReverseProxy's wrapper makes Close do nothing at all.)
type Body struct {
	body  io.ReadCloser
	http1 *http.ResponseController // nil over HTTP/2

	mu      sync.Mutex
	quiet   sync.Cond // told when reading becomes false
	reading bool      // guarded by mu
	ended   bool      // all of it was read; guarded by mu
	closed  bool      // guarded by mu
	cut     bool      // a Read may have been ended by a deadline; guarded by mu
}

// Caller returns the context that r is carried with, and its body, nil when it
// has none. The context ends when the caller goes away, but not when the server
// takes a Read that we ended for that. The function is to be called when the
// answer is complete.
func Caller(w http.ResponseWriter, r *http.Request) (context.Context, context.CancelFunc, *Body) {
	if r.Body == nil || r.ContentLength == 0 {
		ctx, cancel := context.WithCancel(r.Context())
		return ctx, cancel, nil
	}
	b := &Body{body: r.Body}
	b.quiet.L = &b.mu
	if r.ProtoMajor == 1 {
		b.http1 = http.NewResponseController(w)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	stop := context.AfterFunc(r.Context(), func() {
		if !b.wasCut() {
			cancel()
		}
	})
	return ctx, func() { stop(); cancel(); b.settle() }, b
}

// Answered prepares the answer to the request of b, nil being one without a
// body: a connection whose caller is still sending carries no further request,
// for what is left might be taken for one.
func (b *Body) Answered(h http.Header) {
	if b == nil || b.http1 == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ended {
		h.Set("Connection", "close")
	}
}

// settle waits for a Read in progress, which the server would end by an error
// that keeps it from seeing what is left of the body.
func (b *Body) settle() {
	_ = b.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.reading {
		b.quiet.Wait()
	}
}
func (b *Body) wasCut() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cut
}

// Read implements io.Reader.
func (b *Body) Read(p []byte) (int, error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return 0, errLetGo
	}
	b.reading = true
	b.mu.Unlock()
	n, err := b.body.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = false
	b.ended = b.ended || err == io.EOF
	b.quiet.Broadcast()
	if b.cut && err == nil {
		// In time: leave the rest to the server, which drains some of it and
		// closes gently, so that the caller gets to read its answer.
		b.cut = false
		err = b.http1.SetReadDeadline(time.Time{})
	}
	return n, err
}

// Close implements io.Closer.
func (b *Body) Close() error {
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
		b.cut = true
		return b.http1.SetReadDeadline(time.Now().Add(letGoGrace))
	}
	return b.body.Close()
}
