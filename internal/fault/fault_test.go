package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestEveryClassHasAName(t *testing.T) {
	seen := map[string]bool{}
	for i, c := range Classes() {
		name := c.String()
		if int(c) != i || seen[name] || strings.HasPrefix(name, "class(") {
			t.Errorf("class %d is called %q", i, name)
		}
		seen[name] = true
	}
	if next := Class(len(Classes())); !strings.HasPrefix(next.String(), "class(") {
		t.Errorf("Classes() misses %s", next)
	}
}

func TestClassOfAChain(t *testing.T) {
	cause := errors.New("cause")
	for name, c := range map[string]struct {
		err   error
		class Class
		text  string
	}{
		"plain":       {cause, Internal, "cause"},
		"new":         {New(NotFound, "no %s", "x"), NotFound, "no x"},
		"with cause":  {New(Exhausted, "open %s: %w", "x", cause), Exhausted, "open x: cause"},
		"wrapped":     {fmt.Errorf("create: %w", New(Invalid, "bad")), Invalid, "create: bad"},
		"outermost":   {As(Precondition, New(NotFound, "gone")), Precondition, "gone"},
		"joined":      {errors.Join(cause, New(Denied, "no")), Denied, "cause\nno"},
		"canceled":    {fmt.Errorf("wait: %w", context.Canceled), Canceled, "wait: context canceled"},
		"deadline":    {context.DeadlineExceeded, Deadline, "context deadline exceeded"},
		"message too": {&Error{Class: Unavailable, Msg: "reach x", Err: cause}, Unavailable, "reach x: cause"},
	} {
		if got := Of(c.err); got != c.class || c.err.Error() != c.text || !Is(c.err, c.class) {
			t.Errorf("%s: class %s, text %q", name, got, c.err)
		}
	}
	if !errors.Is(New(Internal, "x: %w", cause), cause) || !errors.Is(As(Invalid, cause), cause) {
		t.Error("the cause is lost")
	}
	if As(Invalid, nil) != nil || Is(nil, Internal) {
		t.Error("nil became an error")
	}
}

func TestBadFieldNamesTheField(t *testing.T) {
	var e *Error
	if err := BadField("vcpus", "at most %d", 4); !errors.As(err, &e) || e.Field != "vcpus" || e.Error() != "vcpus: at most 4" || Of(err) != Invalid {
		t.Errorf("%+v", e)
	}
}
