package proxy

import (
	"bytes"
	"errors"
	"net/http"
	"testing"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/sandbox"
)

func TestFailures(t *testing.T) {
	noLink := errors.New("link is down")
	for name, x := range map[string]struct {
		prepare func(*world)
		status  int
		failure Failure
	}{
		"sandbox gone":           {func(w *world) { w.set(sandbox.Gone) }, 404, NotFound},
		"paused":                 {func(w *world) { w.set(sandbox.Paused) }, 400, NotRunning},
		"guest can't be reached": {func(w *world) { w.useErr = fault.New(fault.Unavailable, "no link") }, 503, Unreachable},
		"no room to wake it":     {func(w *world) { w.useErr = fault.New(fault.Exhausted, "no memory") }, 429, NotRunning},
		"port closed":            {func(*world) {}, 503, PortClosed},
		"port unreachable": {func(w *world) {
			w.guest.dialErr = fault.As(fault.Unavailable, &link.StatusError{Status: link.StatusUnreachable})
		}, 503, Unreachable},
		"guest busy": {func(w *world) {
			w.guest.dialErr = fault.As(fault.Exhausted, &link.StatusError{Status: link.StatusBusy})
		}, 429, TooMany},
		"link broken": {func(w *world) { w.guest.dialErr = noLink }, 503, Unreachable},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			x.prepare(w)
			for _, c := range []struct{ url, host string }{
				{"http://front/sandboxes/sb-abc/ports/80/", ""},
				{"http://front/", "80-sb-abc.localhost"},
			} {
				res, body := get(t, w.client(t, false), c.url, c.host)
				if res.StatusCode != x.status || res.Header.Get(FailureHeader) != string(x.failure) {
					t.Errorf("%d %q, want %d %q: %s", res.StatusCode, res.Header.Get(FailureHeader), x.status, x.failure, body)
				}
				if res.Header.Get("Content-Type") != "application/json" || !bytes.Contains([]byte(body), []byte(`"message":`)) {
					t.Errorf("%s: %s", res.Header.Get("Content-Type"), body)
				}
			}
			w.awaitUse(t, 0)
		})
	}
}

// TestGoneMeanwhile: when the way breaks because the sandbox went, that is told.
func TestGoneMeanwhile(t *testing.T) {
	for _, x := range []struct {
		state   sandbox.State
		failure Failure
	}{{sandbox.Gone, NotFound}, {sandbox.Failed, NotRunning}, {sandbox.Running, Unreachable}} {
		t.Run(string(x.state), func(t *testing.T) {
			w := newWorld(t, nil)
			w.servePort(t, 80, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				w.set(x.state)
				panic(http.ErrAbortHandler)
			}))
			res, body := do(t, w.client(t, false), "POST", "http://front/sandboxes/sb-abc/ports/80/", "", "x")
			if got := res.Header.Get(FailureHeader); got != string(x.failure) {
				t.Errorf("%d %q, want %q: %s", res.StatusCode, got, x.failure, body)
			}
		})
	}
}
