package rpcx

import (
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	// maxMessage bounds an error message on the wire, in bytes. gRPC carries it
	// in trailers twice, escaped once and in base64 once, and common clients
	// refuse more than 8 KiB of them.
	maxMessage = 2 << 10
	// maxField bounds the name of a field in a detail, in bytes.
	maxField = 256
	// maxDescription bounds what a detail says of a field, in bytes.
	maxDescription = 512
	// retryDelay is what clients are advised to wait before they repeat a call
	// that may succeed later.
	retryDelay = time.Second
)

// ToConnect returns the form of err that goes to a client: its class as the
// code, its message with all causes (hutch serves one host, whose user needs
// the cause), shortened to 2 KiB of valid UTF-8. Invalid errors that name a
// field carry a google.rpc.BadRequest, Exhausted and Unavailable ones a
// google.rpc.RetryInfo. An error of connect itself keeps its code. A nil err
// stays nil.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	if ce, ok := bare(err); ok {
		return ce
	}
	class := fault.Of(err)
	ce := connect.NewError(CodeOf(class), errors.New(clean(err.Error(), maxMessage)))
	switch class {
	case fault.Invalid:
		if field := fieldOf(err); field != "" {
			addDetail(ce, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{
				Field:       clean(field, maxField),
				Description: clean(strings.TrimPrefix(err.Error(), field+": "), maxDescription),
			}}})
		}
	case fault.Exhausted, fault.Unavailable:
		addDetail(ce, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryDelay)})
	}
	return ce
}

// FromConnect returns an error that came from an RPC as a fault of the same
// class, with the message and the field at fault that the other side sent,
// both bounded: the other side may be hostile. The connect error stays in the
// chain. Errors that no RPC made, io.EOF of a stream among them, are returned
// as they are.
func FromConnect(err error) error {
	ce, ok := bare(err)
	if !ok {
		return err
	}
	e := &fault.Error{
		Class: ClassOf(ce.Code()),
		Err:   &remote{message: clean(ce.Message(), maxMessage), cause: err},
	}
	if e.Class == fault.Invalid {
		e.Field = clean(fieldDetail(ce), maxField)
	}
	if e.Err.Error() == "" {
		e.Msg = strings.ReplaceAll(ce.Code().String(), "_", " ")
		e.Err = nil
	}
	return e
}

// remote shows what the other side said without the code that connect writes
// before it, and keeps the error of connect for errors.As.
type remote struct {
	message string
	cause   error
}

func (r *remote) Error() string { return r.message }
func (r *remote) Unwrap() error { return r.cause }

// bare returns the connect error in err unless a fault was put around it.
func bare(err error) (*connect.Error, bool) {
	var ce *connect.Error
	if !errors.As(err, &ce) || ce == nil {
		return nil, false
	}
	for e := err; e != nil; e = errors.Unwrap(e) {
		switch e.(type) {
		case *connect.Error:
			return ce, true
		case *fault.Error:
			return nil, false
		}
	}
	// Joined errors: a fault among them decides.
	var fe *fault.Error
	return ce, !errors.As(err, &fe)
}

// classOf is fault.Of, and knows errors of connect too.
func classOf(err error) fault.Class {
	if ce, ok := bare(err); ok {
		return ClassOf(ce.Code())
	}
	return fault.Of(err)
}

// fieldOf returns the field that the outermost fault with one names.
func fieldOf(err error) string {
	var fe *fault.Error
	for errors.As(err, &fe) {
		if fe.Field != "" {
			return fe.Field
		}
		err = fe.Err
	}
	return ""
}

func fieldDetail(ce *connect.Error) string {
	for _, d := range ce.Details() {
		value, err := d.Value()
		if err != nil {
			continue // a detail of a type that we don't know
		}
		if bad, ok := value.(*errdetails.BadRequest); ok && len(bad.GetFieldViolations()) > 0 {
			return bad.GetFieldViolations()[0].GetField()
		}
	}
	return ""
}

func addDetail(ce *connect.Error, m proto.Message) {
	if d, err := connect.NewErrorDetail(m); err == nil { // else the error goes without it
		ce.AddDetail(d)
	}
}

// clean makes s valid UTF-8, which protobuf insists on, of at most limit bytes.
func clean(s string, limit int) string {
	const more = "…"
	if len(s) > limit {
		s = s[:limit-len(more)]
		for len(s) > 0 {
			if r, size := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || size != 1 {
				break
			}
			s = s[:len(s)-1]
		}
		s += more
	}
	return strings.ToValidUTF8(s, "?")
}
