package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	"github.com/hutch-run/hutch/internal/fault"
)

// TokenHeader carries a token and leaves Authorization to the guest.
const TokenHeader = "Hutch-Token"

// DefaultDomain is the domain of port hosts when none is configured: browsers
// and resolvers take every name below it to the loopback address.
const DefaultDomain = "localhost"

// localName is the Name of a Principal that needs no token.
const localName = "local"

// Params is what New needs.
type Params struct {
	// Tokens open the API. Empty: TCP is served on loopback only, to everybody.
	Tokens []Token
	// Domain is one more name that requests may be addressed to, besides
	// localhost and loopback addresses, together with all names below it.
	// Default: DefaultDomain.
	Domain string
	// CrossOrigin reports whether a request that a web page of another origin
	// makes is fine: those to web servers in guests may be. nil: none is.
	CrossOrigin func(*http.Request) bool
	// Deny writes the answer to a refused request.
	Deny func(http.ResponseWriter, *http.Request, error)
}

// Authenticator finds out who asks. It is safe for concurrent use.
type Authenticator struct {
	tokens      []Token
	rules       map[string]Role
	domain      string
	crossOrigin func(*http.Request) bool
	deny        func(http.ResponseWriter, *http.Request, error)
	origins     *http.CrossOriginProtection
}

// New returns an Authenticator.
func New(p Params) (*Authenticator, error) {
	if p.Deny == nil {
		return nil, errors.New("auth: Params.Deny is not set")
	}
	if p.Domain == "" {
		p.Domain = DefaultDomain
	}
	if p.CrossOrigin == nil {
		p.CrossOrigin = func(*http.Request) bool { return false }
	}
	return &Authenticator{
		tokens:      p.Tokens,
		rules:       rules(),
		domain:      strings.ToLower(strings.Trim(p.Domain, ".")),
		crossOrigin: p.CrossOrigin,
		deny:        p.Deny,
		origins:     http.NewCrossOriginProtection(),
	}, nil
}

// HasTokens reports whether any token is set up.
func (a *Authenticator) HasTokens() bool { return len(a.tokens) > 0 }

// Middleware finds out who asks, for Authorize further in, and takes our
// tokens off the request. It refuses by itself only what web pages have no
// business with.
func (a *Authenticator) Middleware(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := a.identify(r)
		if err == nil && who.Implicit {
			if err := a.guard(r); err != nil {
				a.deny(w, r, err)
				return
			}
		}
		r = r.WithContext(context.WithValue(r.Context(), verdictKey{}, verdict{who: who, err: err}))
		r.Header = a.withoutSecrets(r.Header)
		next.ServeHTTP(w, r)
	})
}

// Require lets through who may call route.
func (a *Authenticator) Require(route string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := a.Authorize(r.Context(), route); err != nil {
			a.deny(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// identify returns who sent r.
func (a *Authenticator) identify(r *http.Request) (Principal, error) {
	secret, given := credential(r)
	if given {
		if t, ok := match(a.tokens, secret); ok {
			return Principal{Name: t.name, Role: t.role}, nil
		}
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	switch {
	case !ok:
		return Principal{}, fault.New(fault.Unauthenticated, "the listener of this request is not known")
	case local.Network() == "unix":
		return Principal{Name: localName, Role: Admin, Implicit: true}, nil
	case !a.HasTokens() && isLoopback(local):
		return Principal{Name: localName, Role: Admin, Implicit: true}, nil
	case !a.HasTokens():
		return Principal{}, fault.New(fault.Unauthenticated, "%s is not a loopback address, and no tokens are set up; configure a token file", local)
	case given:
		return Principal{}, fault.New(fault.Unauthenticated, "the token is not known here")
	}
	return Principal{}, fault.New(fault.Unauthenticated, "a token is needed: send it as %q or %q", "Authorization: Bearer TOKEN", TokenHeader+": TOKEN")
}

// isLoopback reports whether a is a TCP address that only this host reaches.
func isLoopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// credential returns the token that r carries. A header that is there twice
// counts as none: parts that read it differently must not disagree.
func credential(r *http.Request) (secret string, ok bool) {
	if v := r.Header.Values(TokenHeader); len(v) > 0 {
		return v[0], len(v) == 1
	}
	if r.Method == http.MethodConnect {
		if secret, ok = proxyPassword(r.Header); ok {
			return secret, true
		}
	}
	return bearer(r.Header, "Authorization")
}

func bearer(h http.Header, name string) (secret string, ok bool) {
	v := h.Values(name)
	if len(v) != 1 {
		return "", false
	}
	scheme, rest, _ := strings.Cut(v[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", false
	}
	return strings.TrimSpace(rest), true
}

func proxyPassword(h http.Header) (secret string, ok bool) {
	const name = "Proxy-Authorization"
	if secret, ok = bearer(h, name); ok {
		return secret, true
	}
	scheme, rest, _ := strings.Cut(h.Get(name), " ")
	if len(h.Values(name)) != 1 || !strings.EqualFold(scheme, "Basic") {
		return "", false
	}
	plain, err := base64.StdEncoding.DecodeString(strings.TrimSpace(rest))
	if err != nil {
		return "", false
	}
	_, secret, ok = strings.Cut(string(plain), ":")
	return secret, ok
}

// withoutSecrets returns h without what carries, or is meant to carry, a token
// of ours. An Authorization that is the guest's own stays.
func (a *Authenticator) withoutSecrets(h http.Header) http.Header {
	h = h.Clone()
	h.Del(TokenHeader)
	h.Del("Proxy-Authorization")
	for _, v := range h.Values("Authorization") {
		one := http.Header{"Authorization": {v}}
		if secret, ok := bearer(one, "Authorization"); ok {
			if _, ours := match(a.tokens, secret); ours {
				h.Del("Authorization")
				break
			}
		}
	}
	return h
}

// Interceptor returns the interceptor that asks Authorize about every RPC. It
// belongs inside the one that maps errors, and outside of all others.
func (a *Authenticator) Interceptor() connect.Interceptor { return interceptor{a} }

type interceptor struct{ auth *Authenticator }

// WrapUnary implements connect.Interceptor.
func (i interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := i.auth.Authorize(ctx, req.Spec().Procedure); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient implements connect.Interceptor; it changes nothing.
func (i interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (i interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := i.auth.Authorize(ctx, conn.Spec().Procedure); err != nil {
			return err
		}
		return next(ctx, conn)
	}
}
