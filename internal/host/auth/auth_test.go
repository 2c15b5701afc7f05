package auth

import (
	"context"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
)

const (
	createRPC = "/hostagent.v1.HostAgentService/CreateSandbox"
	listRPC   = "/hostagent.v1.HostAgentService/ListSandboxes"
	healthRPC = "/grpc.health.v1.Health/Check"
)

func newAuth(t *testing.T, tokens []Token, crossOrigin func(*http.Request) bool) *Authenticator {
	t.Helper()
	a, err := New(Params{
		Tokens: tokens, Domain: "boxes.example", CrossOrigin: crossOrigin,
		Deny: func(w http.ResponseWriter, _ *http.Request, err error) {
			w.Header().Set("Class", fault.Of(err).String())
			w.WriteHeader(http.StatusTeapot)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func tcp(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 7777} }

func unixAddr() net.Addr { return &net.UnixAddr{Name: "/run/hutch.sock", Net: "unix"} }

// request makes a request that came in at local, with pairs of header names
// and values.
func request(method, host string, local net.Addr, header ...string) *http.Request {
	r := httptest.NewRequest(method, "http://"+host+"/x", nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	return r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local))
}

// outcome runs r through the middleware and asks for route: "ok" or the class
// of the refusal.
func outcome(a *Authenticator, r *http.Request, route string) (string, http.Header) {
	var seen http.Header
	h := a.Middleware(a.Require(route, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header
		w.Header().Set("Class", "ok")
	})))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result().Header.Get("Class"), seen
}

func TestWhoMayWhat(t *testing.T) {
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	tokens := testTokens(t)
	for name, c := range map[string]struct {
		tokens []Token
		method string
		local  net.Addr
		header []string
		route  string
		want   string
	}{
		"unix, no tokens":                 {nil, "POST", unixAddr(), nil, createRPC, "ok"},
		"unix, tokens set up":             {tokens, "POST", unixAddr(), nil, createRPC, "ok"},
		"unix, token of a reader":         {tokens, "POST", unixAddr(), []string{TokenHeader, readSecret}, createRPC, "denied"},
		"loopback, no tokens":             {nil, "POST", tcp("127.0.0.1"), nil, createRPC, "ok"},
		"loopback v6, no tokens":          {nil, "POST", tcp("::1"), nil, createRPC, "ok"},
		"loopback, tokens set up":         {tokens, "POST", tcp("127.0.0.1"), nil, createRPC, "unauthenticated"},
		"beyond loopback, no tokens":      {nil, "POST", tcp("192.0.2.1"), nil, createRPC, "unauthenticated"},
		"beyond loopback, health":         {nil, "POST", tcp("192.0.2.1"), nil, healthRPC, "ok"},
		"admin by bearer":                 {tokens, "POST", tcp("192.0.2.1"), []string{"Authorization", "Bearer " + adminSecret}, createRPC, "ok"},
		"admin by lower-case bearer":      {tokens, "POST", tcp("192.0.2.1"), []string{"authorization", "bearer " + adminSecret}, createRPC, "ok"},
		"admin by header":                 {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, adminSecret}, createRPC, "ok"},
		"reader lists":                    {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, readSecret}, listRPC, "ok"},
		"reader creates":                  {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, readSecret}, createRPC, "denied"},
		"reader reads metrics":            {tokens, "GET", tcp("192.0.2.1"), []string{TokenHeader, readSecret}, RouteMetrics, "ok"},
		"wrong token":                     {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, "wrong-0123456789-0123456789"}, listRPC, "unauthenticated"},
		"wrong token, health":             {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, "wrong"}, healthRPC, "ok"},
		"empty token":                     {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, ""}, listRPC, "unauthenticated"},
		"token header twice":              {tokens, "POST", tcp("192.0.2.1"), []string{TokenHeader, adminSecret, TokenHeader, adminSecret}, createRPC, "unauthenticated"},
		"authorization twice":             {tokens, "POST", tcp("192.0.2.1"), []string{"Authorization", "Bearer " + adminSecret, "Authorization", "Bearer x"}, createRPC, "unauthenticated"},
		"basic is no token":               {tokens, "POST", tcp("192.0.2.1"), []string{"Authorization", basic("a:" + adminSecret)}, createRPC, "unauthenticated"},
		"proxy password":                  {tokens, "CONNECT", tcp("192.0.2.1"), []string{"Proxy-Authorization", basic("a:" + adminSecret)}, RouteGuestTunnel, "ok"},
		"proxy bearer":                    {tokens, "CONNECT", tcp("192.0.2.1"), []string{"Proxy-Authorization", "Bearer " + adminSecret}, RouteGuestTunnel, "ok"},
		"proxy password on a plain call":  {tokens, "POST", tcp("192.0.2.1"), []string{"Proxy-Authorization", basic("a:" + adminSecret)}, createRPC, "unauthenticated"},
		"route without a rule, admin":     {nil, "POST", unixAddr(), nil, "/no.such.Service/Method", "denied"},
		"no listener known":               {nil, "POST", nil, nil, listRPC, "unauthenticated"},
		"no listener known, with a token": {tokens, "POST", nil, []string{TokenHeader, readSecret}, listRPC, "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAuth(t, c.tokens, nil)
			if got, _ := outcome(a, request(c.method, "localhost", c.local, c.header...), c.route); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestWithoutMiddlewareNobodyIsKnown(t *testing.T) {
	a := newAuth(t, nil, nil)
	if err := a.Authorize(t.Context(), listRPC); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("got %v", err)
	}
	if _, ok := FromContext(t.Context()); ok {
		t.Error("somebody is known")
	}
}

// TestSecretsAreTakenOff: what the handlers, and so guests, get to see.
func TestSecretsAreTakenOff(t *testing.T) {
	tokens := testTokens(t)
	for name, c := range map[string]struct {
		header []string
		want   http.Header
	}{
		"our bearer":              {[]string{"Authorization", "Bearer " + adminSecret}, http.Header{}},
		"our header":              {[]string{TokenHeader, adminSecret}, http.Header{}},
		"guest's bearer":          {[]string{TokenHeader, adminSecret, "Authorization", "Bearer guest"}, http.Header{"Authorization": {"Bearer guest"}}},
		"guest's basic":           {[]string{TokenHeader, adminSecret, "Authorization", "Basic cm9vdDo="}, http.Header{"Authorization": {"Basic cm9vdDo="}}},
		"ours hidden as second":   {[]string{"Authorization", "Basic x", "Authorization", "Bearer " + adminSecret}, http.Header{}},
		"proxy password":          {[]string{"Proxy-Authorization", "Basic x"}, http.Header{}},
		"another of ours, spaces": {[]string{TokenHeader, adminSecret, "Authorization", "bearer   " + readSecret + " "}, http.Header{}},
	} {
		t.Run(name, func(t *testing.T) {
			r := request("POST", "localhost", unixAddr(), c.header...)
			class, seen := outcome(newAuth(t, tokens, nil), r, createRPC)
			if class != "ok" {
				t.Fatalf("refused: %s", class)
			}
			if diff := cmp.Diff(c.want, seen); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWebPages(t *testing.T) {
	loop := tcp("127.0.0.1")
	for name, c := range map[string]struct {
		method, host string
		local        net.Addr
		header       []string
		want         string
	}{
		"curl":                                {"POST", "127.0.0.1:7777", loop, nil, "ok"},
		"curl v6":                             {"POST", "[::1]:7777", loop, nil, "ok"},
		"curl by name":                        {"POST", "localhost:7777", loop, nil, "ok"},
		"name below localhost":                {"GET", "8080-sb.localhost:7777", loop, nil, "ok"},
		"configured domain":                   {"GET", "boxes.example", loop, nil, "ok"},
		"name below the domain, upper case":   {"GET", "8080-SB.Boxes.Example.", loop, nil, "ok"},
		"rebound name":                        {"POST", "evil.example:7777", loop, nil, "denied"},
		"rebound name, reading":               {"GET", "evil.example:7777", loop, nil, "denied"},
		"name that ends alike":                {"POST", "evillocalhost", loop, nil, "denied"},
		"address that is not loopback":        {"POST", "192.0.2.7:7777", loop, nil, "denied"},
		"unix socket, any name":               {"POST", "hutch", unixAddr(), nil, "ok"},
		"page, new browser":                   {"POST", "127.0.0.1:7777", loop, []string{"Sec-Fetch-Site", "cross-site", "Origin", "https://evil.example"}, "denied"},
		"page of a sibling name":              {"POST", "localhost:7777", loop, []string{"Sec-Fetch-Site", "same-site", "Origin", "http://8080-sb.localhost:7777"}, "denied"},
		"page, old browser":                   {"POST", "127.0.0.1:7777", loop, []string{"Origin", "https://evil.example"}, "denied"},
		"page without an origin":              {"POST", "127.0.0.1:7777", loop, []string{"Origin", "null"}, "denied"},
		"page, reading":                       {"GET", "127.0.0.1:7777", loop, []string{"Sec-Fetch-Site", "cross-site"}, "denied"},
		"page, websocket":                     {"GET", "127.0.0.1:7777", loop, []string{"Origin", "https://evil.example", "Connection", "Upgrade", "Upgrade", "websocket"}, "denied"},
		"page, through a forwarded socket":    {"POST", "localhost", unixAddr(), []string{"Origin", "https://evil.example"}, "denied"},
		"address bar":                         {"GET", "127.0.0.1:7777", loop, []string{"Sec-Fetch-Site", "none"}, "ok"},
		"page of our own":                     {"POST", "127.0.0.1:7777", loop, []string{"Sec-Fetch-Site", "same-origin", "Origin", "http://127.0.0.1:7777"}, "ok"},
		"page, where that is fine":            {"POST", "fine.localhost", loop, []string{"Sec-Fetch-Site", "cross-site"}, "ok"},
		"rebound name, where a page is fine":  {"POST", "fine.evil.example", loop, []string{"Sec-Fetch-Site", "cross-site"}, "denied"},
		"tunnel to a name that is not a host": {"CONNECT", "sb-abc:80", loop, nil, "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAuth(t, nil, func(r *http.Request) bool { return r.Host == "fine.localhost" })
			r := request(c.method, "x", c.local, c.header...)
			r.Host = c.host
			if got, _ := outcome(a, r, createRPC); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// TestTokenHoldersMayBePages: a token is no cookie, a page has it only when its
// user gave it.
func TestTokenHoldersMayBePages(t *testing.T) {
	a := newAuth(t, testTokens(t), nil)
	r := request("POST", "hutch.example", tcp("192.0.2.1"), "Origin", "https://panel.example", TokenHeader, adminSecret)
	if got, _ := outcome(a, r, createRPC); got != "ok" {
		t.Errorf("got %s", got)
	}
}
