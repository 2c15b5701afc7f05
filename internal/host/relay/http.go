package relay

import (
	"context"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
)

// maxResponseHeader bounds the head of an answer from a guest, in bytes.
const maxResponseHeader = 64 << 10

// Transport speaks HTTP/1.1 on connections of dial, one for each request.
func Transport(dial func(context.Context) (net.Conn, error)) http.RoundTripper {
	return &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxResponseHeader,
		WriteBufferSize:        32 << 10,
		ReadBufferSize:         32 << 10,
	}
}

// Final returns w without informational answers, whose headers a guest would
// get past a look at its answer. 101 is not one of them: it is the last of its
// request.
func Final(w http.ResponseWriter) http.ResponseWriter { return &finalWriter{w} }

type finalWriter struct{ http.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (f *finalWriter) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		f.ResponseWriter.WriteHeader(status)
	}
}

// Unwrap gives http.ResponseController the rest.
func (f *finalWriter) Unwrap() http.ResponseWriter { return f.ResponseWriter }

// Buffers are what bytes are copied through. The zero value is ready.
type Buffers struct{ pool sync.Pool }

var _ httputil.BufferPool = (*Buffers)(nil)

// Get implements httputil.BufferPool.
func (b *Buffers) Get() []byte {
	if buf, ok := b.pool.Get().(*[]byte); ok {
		return *buf
	}
	return make([]byte, 64<<10)
}

// Put implements httputil.BufferPool.
func (b *Buffers) Put(buf []byte) { b.pool.Put(&buf) }
