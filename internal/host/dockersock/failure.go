package dockersock

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/sandbox"
)

// refuse answers r with err, as Docker's daemon tells errors.
func (d *door) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // nobody reads it, or the socket is closing
	}
	body, jsonErr := json.Marshal(map[string]string{"message": err.Error()})
	if jsonErr != nil {
		body = []byte(`{"message":"unreadable error"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(statusOf(err))
	if r.Method != http.MethodHead {
		_, _ = w.Write(append(body, '\n'))
	}
}

// statusOf returns the HTTP status of an error. Those that clients try again by
// themselves, or take for something of Docker's, are not among them.
func statusOf(err error) int {
	switch fault.Of(err) {
	case fault.NotFound:
		return http.StatusNotFound
	case fault.Invalid:
		return http.StatusBadRequest
	case fault.Unimplemented:
		return http.StatusNotImplemented
	case fault.Deadline:
		return http.StatusGatewayTimeout
	case fault.Internal:
		return http.StatusInternalServerError
	case fault.Exists, fault.Precondition, fault.Exhausted, fault.Denied, fault.Unauthenticated, fault.Unavailable, fault.Canceled:
	}
	return http.StatusServiceUnavailable
}

// lost answers r, whose way to the daemon failed with cause. What the sandbox is
// by now tells more than the cause can.
func (d *door) lost(w http.ResponseWriter, r *http.Request, cause error) {
	d.log.DebugContext(r.Context(), "request to Docker was lost", "path", r.URL.Path, "error", cause)
	d.refuse(w, r, d.judge(cause))
}

func (d *door) judge(cause error) error {
	v, err := d.s.p.Sandboxes.Get(string(d.id))
	switch {
	case fault.Is(err, fault.NotFound), err == nil && v.ID != d.id:
		return fault.New(fault.Unavailable, "sandbox %s is gone", d.id)
	case err == nil && v.State != sandbox.Running:
		return fault.New(fault.Unavailable, "sandbox %s is %s", d.id, v.State)
	case errors.Is(cause, io.EOF), errors.Is(cause, io.ErrUnexpectedEOF):
		return fault.New(fault.Unavailable, "Docker in sandbox %s ended the connection without an answer", d.id)
	case refused(cause):
		return fault.New(fault.Unavailable, "Docker in sandbox %s says that it is up, and its socket is not there: %v", d.id, cause)
	}
	return cause
}
