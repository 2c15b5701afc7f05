package proxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"syscall"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/link"
	"github.com/hutch-run/hutch/internal/rpcx"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// FailureHeader tells programs which part of the way failed.
const FailureHeader = "Hutch-Error"

// Failure is a value of FailureHeader. It is on an answer exactly when the
// answer is the proxy's own; guests can't send it.
type Failure string

// The failures.
const (
	// NotFound: there is no such sandbox (any more).
	NotFound Failure = "sandbox_not_found"
	// NotRunning: the sandbox is there, in a state that serves nothing.
	NotRunning Failure = "sandbox_not_running"
	// PortClosed: the guest is there, and nothing listens on that port.
	PortClosed Failure = "port_closed"
	// Unreachable: the sandbox should serve, but the way to it is broken, or
	// what answered in it broke off or made no sense.
	Unreachable Failure = "guest_unreachable"
	// TooMany: the sandbox has as many connections as it may.
	TooMany Failure = "too_many_connections"
)

// failureOf says what an error of Get or Use means.
func (p *Proxy) failureOf(err error) Failure {
	switch fault.Of(err) {
	case fault.NotFound:
		return NotFound
	case fault.Precondition, fault.Exhausted: // it sleeps, and there is no room to wake it
		return NotRunning
	case fault.Unavailable, fault.Internal, fault.Deadline:
		return Unreachable
	case fault.Invalid, fault.Exists, fault.Denied, fault.Unauthenticated, fault.Canceled, fault.Unimplemented:
		return ""
	}
	return ""
}

// refuse answers r with err, in the protocol of r.
func (p *Proxy) refuse(w http.ResponseWriter, r *http.Request, err error, f Failure) {
	if f != "" {
		w.Header().Set(FailureHeader, string(f))
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if fault.Is(err, fault.Unauthenticated) {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if err := p.errors.Write(w, r, rpcx.ToConnect(err)); err != nil {
		p.log.DebugContext(r.Context(), "proxy answer not delivered", "err", err)
	}
}

// lost answers r, whose way to the guest of v failed with cause. What the
// sandbox is by now tells more than the cause can.
func (p *Proxy) lost(w http.ResponseWriter, r *http.Request, v visit, cause error) {
	f, err := p.judge(r.Context(), v, cause)
	p.log.DebugContext(r.Context(), "proxied request failed",
		"sandbox_id", v.sandbox, "port", v.port, "failure", string(f), "err", cause)
	p.refuse(w, r, err, f)
}

func (p *Proxy) judge(ctx context.Context, v visit, cause error) (Failure, error) {
	switch {
	case p.open.Err() != nil:
		return "", fault.New(fault.Unavailable, "hutchd is stopping")
	case ctx.Err() != nil:
		return "", fault.As(fault.Of(ctx.Err()), ctx.Err())
	}
	view, err := p.sandboxes.Get(string(v.sandbox))
	if fault.Is(err, fault.NotFound) || (err == nil && view.ID != v.sandbox) {
		return NotFound, fault.New(fault.NotFound, "sandbox %s is gone", v.sandbox)
	}
	if err == nil && view.State != sandbox.Running {
		return NotRunning, fault.New(fault.Precondition, "sandbox %s is %s", v.sandbox, view.State)
	}
	var dial *dialError
	switch {
	case !errors.As(cause, &dial):
	case fault.Is(dial.err, fault.Exhausted):
		return TooMany, fault.New(fault.Exhausted, "sandbox %s takes no more connections: %v", v.sandbox, cause)
	case portClosed(dial.err):
		return PortClosed, fault.New(fault.Unavailable, "nothing listens on port %d of sandbox %s", v.port, v.sandbox)
	}
	if errors.Is(cause, io.EOF) || errors.Is(cause, io.ErrUnexpectedEOF) {
		cause = errors.New("the connection ended before an answer")
	}
	return Unreachable, fault.New(fault.Unavailable, "reach sandbox %s: %v", v.sandbox, cause)
}

// dialError marks an error of opening a port, to tell it from what happens on
// an open one.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// portClosed reports whether err of Guest.DialPort says that the guest is
// there but nothing listens on the port.
func portClosed(err error) bool {
	var status *link.StatusError
	if errors.As(err, &status) {
		return status.Status == link.StatusRefused
	}
	return errors.Is(err, syscall.ECONNREFUSED) // a guest that is dialled directly
}
