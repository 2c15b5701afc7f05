package rpc

import (
	"net/http"
	"sync"
)

// Lazy returns a Mount whose handler is built by the first request for it.
// To build the handler of a service reads its whole description, which a
// create of a sandbox would otherwise wait for, service by service. The build
// gets no path from its caller: what it mounts must belong at path.
func Lazy(path string, build func() http.Handler) Mount {
	return Mount{Path: path, Handler: &lazyHandler{build: sync.OnceValue(build)}}
}

type lazyHandler struct{ build func() http.Handler }

// ServeHTTP implements http.Handler.
func (h *lazyHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.build().ServeHTTP(w, r) }
