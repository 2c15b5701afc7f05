// Package fault gives every error of hutch one of a closed set of classes.
//
// It owns the classes, and keeps the part of an error that a caller may see
// apart from its cause. It never maps to a protocol: internal/rpcx does that,
// once for both sides. Tested by its own unit tests and by the table in rpcx
// that walks all classes.
package fault

import (
	"context"
	"errors"
	"fmt"
)

// Class is the kind of a failure, as a caller has to treat it.
type Class uint8

// The classes. Each has exactly one RPC code, see internal/rpcx.
const (
	// Internal is everything without a better class: a bug or a broken host.
	Internal Class = iota
	// Invalid is a request that can never succeed as it stands.
	Invalid
	// NotFound is a thing that does not exist.
	NotFound
	// Exists is a thing that is there already, and is another one.
	Exists
	// Precondition is a request that the thing's state forbids now.
	Precondition
	// Exhausted is a lack of room; the same request may succeed later.
	Exhausted
	// Unavailable is a part that can't be reached now; retrying is right.
	Unavailable
	// Denied is a request that the caller may not make.
	Denied
	// Unauthenticated is a request without valid credentials.
	Unauthenticated
	// Canceled is work given up because the caller went away.
	Canceled
	// Deadline is work given up because its time was over.
	Deadline
	// Unimplemented is something that this version does not do.
	Unimplemented
)

// Classes lists every class, for tests that must not miss one.
func Classes() []Class {
	return []Class{
		Internal, Invalid, NotFound, Exists, Precondition, Exhausted,
		Unavailable, Denied, Unauthenticated, Canceled, Deadline, Unimplemented,
	}
}

// String returns the name of c as it appears in logs.
func (c Class) String() string {
	switch c {
	case Internal:
		return "internal"
	case Invalid:
		return "invalid"
	case NotFound:
		return "not_found"
	case Exists:
		return "exists"
	case Precondition:
		return "precondition"
	case Exhausted:
		return "exhausted"
	case Unavailable:
		return "unavailable"
	case Denied:
		return "denied"
	case Unauthenticated:
		return "unauthenticated"
	case Canceled:
		return "canceled"
	case Deadline:
		return "deadline"
	case Unimplemented:
		return "unimplemented"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Error is an error with a class. Its message is safe to show to callers; Err,
// when set, is the cause.
type Error struct {
	Class Class
	Msg   string
	// Field names the request field at fault, for Invalid. May be empty.
	Field string
	Err   error
}

// Error returns the message, and the cause behind it.
func (e *Error) Error() string {
	if e.Err == nil {
		return e.Msg
	}
	if e.Msg == "" {
		return e.Err.Error()
	}
	return e.Msg + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New returns an error of class c with the message of the format. A %w in the
// format keeps its operand as the cause without printing it twice.
func New(c Class, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if cause := errors.Unwrap(err); cause != nil {
		return &Error{Class: c, Err: err}
	}
	return &Error{Class: c, Msg: err.Error()}
}

// BadField returns an Invalid error that names the field at fault.
func BadField(field, format string, args ...any) error {
	return &Error{Class: Invalid, Field: field, Msg: field + ": " + fmt.Sprintf(format, args...)}
}

// As gives err the class c, keeping it as the cause. A nil err stays nil.
func As(c Class, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Class: c, Err: err}
}

// Of returns the class of err: that of the outermost Error in its chain, the
// fitting one for context errors, Internal for anything else.
func Of(err error) Class {
	var e *Error
	if errors.As(err, &e) {
		return e.Class
	}
	switch {
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return Deadline
	}
	return Internal
}

// Is reports whether err is not nil and of class c.
func Is(err error, c Class) bool { return err != nil && Of(err) == c }
