package rpcx

import (
	"connectrpc.com/connect"

	"github.com/hutch-run/hutch/internal/fault"
)

// CodeOf returns the RPC code of a class. Every class has its own.
func CodeOf(c fault.Class) connect.Code {
	switch c {
	case fault.Internal:
		return connect.CodeInternal
	case fault.Invalid:
		return connect.CodeInvalidArgument
	case fault.NotFound:
		return connect.CodeNotFound
	case fault.Exists:
		return connect.CodeAlreadyExists
	case fault.Precondition:
		return connect.CodeFailedPrecondition
	case fault.Exhausted:
		return connect.CodeResourceExhausted
	case fault.Unavailable:
		return connect.CodeUnavailable
	case fault.Denied:
		return connect.CodePermissionDenied
	case fault.Unauthenticated:
		return connect.CodeUnauthenticated
	case fault.Canceled:
		return connect.CodeCanceled
	case fault.Deadline:
		return connect.CodeDeadlineExceeded
	case fault.Unimplemented:
		return connect.CodeUnimplemented
	}
	return connect.CodeInternal
}

// ClassOf returns the class of an RPC code. Codes that hutch never sends, but
// a peer or a proxy between may, get the class with the same advice to the
// caller.
func ClassOf(code connect.Code) fault.Class {
	switch code {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		return fault.Invalid
	case connect.CodeNotFound:
		return fault.NotFound
	case connect.CodeAlreadyExists:
		return fault.Exists
	case connect.CodeFailedPrecondition:
		return fault.Precondition
	case connect.CodeResourceExhausted:
		return fault.Exhausted
	case connect.CodeUnavailable, connect.CodeAborted:
		return fault.Unavailable
	case connect.CodePermissionDenied:
		return fault.Denied
	case connect.CodeUnauthenticated:
		return fault.Unauthenticated
	case connect.CodeCanceled:
		return fault.Canceled
	case connect.CodeDeadlineExceeded:
		return fault.Deadline
	case connect.CodeUnimplemented:
		return fault.Unimplemented
	case connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		return fault.Internal
	}
	return fault.Internal
}

// statusCanceled is the HTTP status of a request whose caller went away. The
// Connect protocol uses it; net/http has no name for it.
const statusCanceled = 499

// HTTPStatus returns the HTTP status for err on plain HTTP endpoints: the one
// that the Connect protocol gives the same error, so that a caller sees one
// status for one failure wherever it hits. A nil err is 200.
func HTTPStatus(err error) int {
	if err == nil {
		return 200
	}
	switch classOf(err) {
	case fault.Invalid, fault.Precondition:
		return 400
	case fault.Unauthenticated:
		return 401
	case fault.Denied:
		return 403
	case fault.NotFound:
		return 404
	case fault.Exists:
		return 409
	case fault.Exhausted:
		return 429
	case fault.Canceled:
		return statusCanceled
	case fault.Unimplemented:
		return 501
	case fault.Unavailable:
		return 503
	case fault.Deadline:
		return 504
	case fault.Internal:
		return 500
	}
	return 500
}
