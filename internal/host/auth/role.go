package auth

import (
	"context"

	"github.com/hutch-run/hutch/internal/fault"
)

// Role is what somebody may do. A higher role may do what a lower one may.
type Role uint8

// The roles.
const (
	// Public is for what anybody who reaches the listener may call.
	Public Role = iota
	// Read may look at sandboxes, events, logs and numbers, but change nothing
	// and see no environment, file or process of a sandbox.
	Read
	// Admin may do everything that the API offers.
	Admin
)

// String names r as token files do.
func (r Role) String() string {
	switch r {
	case Public:
		return "public"
	case Read:
		return "read"
	case Admin:
		return "admin"
	}
	return "unknown role"
}

// Principal is who asks.
type Principal struct {
	// Name is the name of the token, or "local" for one who needs none.
	Name string
	Role Role
	// Implicit says that the place the request came from stands for it, and no
	// token.
	Implicit bool
}

// verdict is what Middleware found out about a request.
type verdict struct {
	who Principal
	err error
}

type verdictKey struct{}

// FromContext returns who asks. ok is false when nobody is known.
func FromContext(ctx context.Context) (p Principal, ok bool) {
	v, found := ctx.Value(verdictKey{}).(verdict)
	return v.who, found && v.err == nil
}

// Authorize says whether the caller in ctx, put there by Middleware, may call
// route: a procedure ("/package.Service/Method") or one of the Route
// constants. A route without a rule is Denied.
func (a *Authenticator) Authorize(ctx context.Context, route string) error {
	need, ok := a.rules[route]
	if !ok {
		return fault.New(fault.Denied, "%s is not open to callers", route)
	}
	if need == Public {
		return nil
	}
	v, found := ctx.Value(verdictKey{}).(verdict)
	if !found {
		return fault.New(fault.Unauthenticated, "no caller is known")
	}
	if v.err != nil {
		return v.err
	}
	if v.who.Role < need {
		return fault.New(fault.Denied, "token %q has role %s, and %s needs %s", v.who.Name, v.who.Role, route, need)
	}
	return nil
}
