package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"

	"connectrpc.com/connect"
)

// exitStatus is an error that asks for an exit code. Its message may be empty:
// the guest has said all there is.
type exitStatus struct {
	code int
	msg  string
}

// Error returns the message.
func (e exitStatus) Error() string {
	if e.msg == "" {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.msg
}

// explain turns err into a sentence that says what to do next. host is the
// address that was used.
func explain(err error, host string) string {
	if errors.Is(err, context.Canceled) {
		return "interrupted"
	}
	if unreachable(err) {
		return fmt.Sprintf("can't reach hutchd at %s: %v\nIs it running? Start it with: hutchd   (and before the first start: hutchd setup)\nAnother address is set with --host or HUTCH_HOST.", host, rootCause(err))
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err.Error()
	}
	switch ce.Code() {
	case connect.CodeUnauthenticated:
		return ce.Message() + "\nGive the token in HUTCH_TOKEN or HUTCH_TOKEN_FILE."
	case connect.CodeResourceExhausted:
		return ce.Message() + "\nThe host has no room now; trying again later may work."
	case connect.CodeInternal, connect.CodeUnknown:
		return ce.Message() + "\nIf this should not happen: hutch debug collects what a bug report needs."
	default:
		return ce.Message()
	}
}

// unreachable reports whether hutchd itself could not be reached.
func unreachable(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" ||
		errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) && connect.CodeOf(err) == connect.CodeUnavailable
}

func rootCause(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}
