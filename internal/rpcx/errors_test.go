package rpcx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"unicode/utf8"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	"github.com/hutch-run/hutch/internal/fault"
)

// allCodes are the codes of the protocol, 1 to 16.
func allCodes() []connect.Code {
	var codes []connect.Code
	for c := connect.CodeCanceled; c <= connect.CodeUnauthenticated; c++ {
		codes = append(codes, c)
	}
	return codes
}

func TestEveryClassHasACodeOfItsOwn(t *testing.T) {
	seen := map[connect.Code]fault.Class{}
	for _, class := range fault.Classes() {
		code := CodeOf(class)
		if other, taken := seen[code]; taken {
			t.Errorf("%v and %v share the code %v", class, other, code)
		}
		seen[code] = class
		if got := ClassOf(code); got != class {
			t.Errorf("%v goes out as %v and comes back as %v", class, code, got)
		}
		if class != fault.Internal && code == connect.CodeInternal {
			t.Errorf("%v is missing in the table", class)
		}
	}
}

func TestEveryCodeHasAClass(t *testing.T) {
	internal := map[connect.Code]bool{
		connect.CodeInternal: true, connect.CodeUnknown: true, connect.CodeDataLoss: true,
	}
	for _, code := range allCodes() {
		if got := ClassOf(code); (got == fault.Internal) != internal[code] {
			t.Errorf("code %v has class %v", code, got)
		}
	}
	if got := ClassOf(connect.Code(99)); got != fault.Internal {
		t.Errorf("an unknown code has class %v", got)
	}
}

func TestErrorsSurviveTheWayAndBack(t *testing.T) {
	for _, class := range fault.Classes() {
		in := fmt.Errorf("start sandbox sb-1: %w", fault.New(class, "no such luck"))
		out := FromConnect(ToConnect(in))
		if got := fault.Of(out); got != class {
			t.Errorf("class %v came back as %v", class, got)
		}
		if got, want := out.Error(), in.Error(); got != want {
			t.Errorf("message %q came back as %q", want, got)
		}
		if again := FromConnect(ToConnect(out)); again.Error() != in.Error() || fault.Of(again) != class {
			t.Errorf("a second hop made %v %q of %v %q", fault.Of(again), again, class, in)
		}
	}
}

func TestFieldTravelsInADetail(t *testing.T) {
	in := fmt.Errorf("create sandbox: %w", fault.As(fault.Invalid, fault.BadField("vcpus", "must be at most %d", 64)))
	shown := ToConnect(in)
	var ce *connect.Error
	if !errors.As(shown, &ce) || len(ce.Details()) != 1 {
		t.Fatalf("error %v has no detail", shown)
	}
	value, err := ce.Details()[0].Value()
	if err != nil {
		t.Fatal(err)
	}
	bad, ok := value.(*errdetails.BadRequest)
	if !ok || bad.GetFieldViolations()[0].GetField() != "vcpus" {
		t.Errorf("detail = %v, want the field vcpus", value)
	}
	var fe *fault.Error
	if back := FromConnect(shown); !errors.As(back, &fe) || fe.Field != "vcpus" {
		t.Errorf("field came back in %#v", back)
	}
}

func TestRetryableErrorsSaySo(t *testing.T) {
	for _, class := range fault.Classes() {
		var ce *connect.Error
		if !errors.As(ToConnect(fault.New(class, "x")), &ce) {
			t.Fatalf("no connect error for %v", class)
		}
		retry := false
		for _, d := range ce.Details() {
			retry = retry || d.Type() == "google.rpc.RetryInfo"
		}
		if want := class == fault.Exhausted || class == fault.Unavailable; retry != want {
			t.Errorf("%v carries RetryInfo = %v, want %v", class, retry, want)
		}
	}
}

func TestPlainAndConnectErrors(t *testing.T) {
	limit := connect.NewError(connect.CodeResourceExhausted, errors.New("message too large"))
	for _, tc := range []struct {
		name   string
		err    error
		code   connect.Code
		status int
	}{
		{"plain", errors.New("disk on fire"), connect.CodeInternal, 500},
		{"canceled", fmt.Errorf("wait: %w", context.Canceled), connect.CodeCanceled, 499},
		{"deadline", context.DeadlineExceeded, connect.CodeDeadlineExceeded, 504},
		{"of connect", fmt.Errorf("read: %w", limit), connect.CodeResourceExhausted, 429},
		{"of connect, joined", errors.Join(limit, errors.New("y")), connect.CodeResourceExhausted, 429},
		{"fault around connect", fault.As(fault.Unavailable, limit), connect.CodeUnavailable, 503},
		{"connect around fault", connect.NewError(connect.CodeAborted, fault.New(fault.NotFound, "x")), connect.CodeAborted, 503},
		{"outer fault wins", fault.As(fault.Precondition, fault.New(fault.NotFound, "x")), connect.CodeFailedPrecondition, 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := connect.CodeOf(ToConnect(tc.err)); got != tc.code {
				t.Errorf("code = %v, want %v", got, tc.code)
			}
			if got := HTTPStatus(tc.err); got != tc.status {
				t.Errorf("HTTP status = %d, want %d", got, tc.status)
			}
		})
	}
	if ToConnect(nil) != nil || FromConnect(nil) != nil || HTTPStatus(nil) != 200 {
		t.Error("no error became one")
	}
	if got := FromConnect(io.EOF); got != io.EOF {
		t.Errorf("io.EOF became %v", got)
	}
}

func TestHTTPStatusCoversEveryClass(t *testing.T) {
	for _, class := range fault.Classes() {
		status := HTTPStatus(fault.New(class, "x"))
		if status < 400 || status > 599 || (status == 500) != (class == fault.Internal) {
			t.Errorf("%v has HTTP status %d", class, status)
		}
	}
}

func TestMessagesAreBoundedAndValid(t *testing.T) {
	for _, tc := range []struct{ name, in string }{
		{"long", strings.Repeat("x", 1<<20)},
		{"long, cut within a rune", strings.Repeat("€", 1<<10)},
		{"broken", "a\xff\xfe\xc3"},
		{"long and broken", strings.Repeat("\xff", 1<<20)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, in *connect.Error
			if !errors.As(ToConnect(errors.New(tc.in)), &out) {
				t.Fatal("no connect error")
			}
			if n := len(out.Message()); n == 0 || n > maxMessage || !utf8.ValidString(out.Message()) {
				t.Errorf("sent message has %d bytes, valid = %v", n, utf8.ValidString(out.Message()))
			}
			hostile := FromConnect(connect.NewError(connect.CodeInternal, errors.New(tc.in)))
			if n := len(hostile.Error()); n == 0 || n > maxMessage {
				t.Errorf("received message has %d bytes", n)
			}
			if !errors.As(hostile, &in) {
				t.Error("the cause is lost")
			}
		})
	}
	if got := FromConnect(connect.NewError(connect.CodeNotFound, nil)).Error(); got != "not found" {
		t.Errorf("an error without a message reads %q", got)
	}
}
