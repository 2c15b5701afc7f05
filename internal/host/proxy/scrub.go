package proxy

import (
	"net/http"
	"net/http/httputil"
	"strings"
)

// pageSandbox takes the origin from pages that are served under a name they
// share with the API, and leaves them what a page can do without one.
const pageSandbox = "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"

// scrubRequest takes off what is not for guests and says where the request
// came from. What ReverseProxy takes off by itself (hop-by-hop headers, those
// named by Connection, Forwarded, X-Forwarded-For, -Host, -Proto) is gone.
func scrubRequest(pr *httputil.ProxyRequest, t target) {
	h := pr.Out.Header
	scrubOwn(h)
	for name := range h {
		if strings.HasPrefix(name, "X-Forwarded-") {
			delete(h, name)
		}
	}
	h.Del("X-Real-Ip")
	h.Del("Expect") // our own server answers it
	if t.kind != hostPort {
		h.Del("Cookie")
	}
	if t.kind == guestAPI {
		keepBasic(h)
		h.Del("Connection") // an upgrade: these APIs have none
		h.Del("Upgrade")
		return
	}
	pr.SetXForwarded()
	if t.prefix != "" {
		h.Set("X-Forwarded-Prefix", t.prefix)
	}
}

// keepBasic takes off every Authorization but a single Basic one.
func keepBasic(h http.Header) {
	v := h.Values("Authorization")
	if len(v) == 0 {
		return
	}
	if scheme, _, _ := strings.Cut(v[0], " "); len(v) > 1 || !strings.EqualFold(scheme, "Basic") {
		h.Del("Authorization")
	}
}

// scrubResponse takes off what a guest may not say to browsers or in our name.
func scrubResponse(res *http.Response, t target) {
	h := res.Header
	scrubOwn(h)
	scrubOwn(res.Trailer)
	h.Del("Alt-Svc") // would send callers around the proxy
	if t.kind == hostPort {
		ownCookies(h)
	} else {
		// The origin is not the guest's own.
		for _, name := range []string{"Set-Cookie", "Clear-Site-Data", "Strict-Transport-Security", "Service-Worker-Allowed", "Origin-Agent-Cluster"} {
			h.Del(name)
		}
		h.Set("X-Content-Type-Options", "nosniff")
		if t.kind == pathPort || t.route == RouteGuestFiles {
			h.Add("Content-Security-Policy", pageSandbox)
		}
	}
	if len(res.Trailer) > 0 {
		h.Del("Content-Length") // with it HTTP/1.1 has no place for a trailer
		h.Del("Trailer")        // ReverseProxy writes its own
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		res.Body = &cleanTrailer{ReadCloser: res.Body, res: res}
	}
}

// scrubOwn takes off all headers of hutch's own.
func scrubOwn(h http.Header) {
	for name := range h {
		if strings.HasPrefix(http.CanonicalHeaderKey(name), "Hutch-") {
			delete(h, name)
		}
	}
}

// ownCookies takes the Domain attribute off all cookies, so that they are for
// the one host name that sets them.
func ownCookies(h http.Header) {
	cookies := h["Set-Cookie"]
	for i, c := range cookies {
		parts := strings.Split(c, ";")
		kept := parts[:1]
		for _, attribute := range parts[1:] {
			name, _, _ := strings.Cut(attribute, "=")
			if !strings.EqualFold(strings.TrimSpace(name), "Domain") {
				kept = append(kept, attribute)
			}
		}
		cookies[i] = strings.Join(kept, ";")
	}
}
