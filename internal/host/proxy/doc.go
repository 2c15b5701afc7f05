// Package proxy is the way from outside into guests, at the level of HTTP.
//
// It owns the forms of address, the list of guest APIs that may be reached,
// what is taken off requests and answers on their way, and the account of what
// is in flight. It never looks into messages, never decides who may call (a
// function given to it does), and never speaks to anything but the guest of
// the sandbox that was addressed.
//
// The forms of address, ID being an id or a prefix that names only one:
//
//	/sandboxes/ID/process.Process/Start        a guest API: process.Process, filesystem.Filesystem,
//	/sandboxes/ID/files?path=/etc/hosts        arcbox.v1.AgentService, /files and /health; no other
//	Hutch-Sandbox: ID    /process.Process/List the same by a header, for clients that can't set a prefix
//	/sandboxes/ID/ports/8080/x?y               a web server in the guest, asked for /x?y
//	8080-ID.DOMAIN       /x?y                  the same by its host name; the id must be whole
//	CONNECT ID:8080, CONNECT 8080-ID.DOMAIN:80 raw bytes from and to a port
//	CONNECT ID.docker:2375                     the Docker API in the guest, as its socket on the host serves it
//	49983-ID.DOMAIN      /process.Process/List the guest APIs where SDKs of E2B's protocol look for them
//
// The host name decides before anything else, so that a page that a guest
// serves has nothing but its guest under its own name. A browser keeps cookies
// and storage per host name, which is why names take whole ids only.
//
// Pages under /sandboxes/ID/ports/ share their origin with the API and with
// other sandboxes. They therefore come with a Content-Security-Policy that
// takes the origin from them, and cookies pass in neither direction: that form
// is for programs, the host name for browsers. With a host name, cookies pass
// without their Domain attribute, so that each guest sets its own only. (A
// script in a page can still set one for DOMAIN, as on any shared domain: give
// hutch a domain of its own, or put it on the Public Suffix List.)
//
// To guest APIs, Authorization passes only when it is Basic, which names the
// user there. Hop-by-hop headers, forwarding headers of strangers and all
// Hutch- headers are taken off both ways; X-Forwarded-For, -Host, -Proto and
// -Prefix say where a request came from. Informational answers (1xx) but 101
// end here. Requests to ports are HTTP/1.1, one connection each; gRPC servers
// in guests are reached through CONNECT.
//
// A sandbox counts as active from the arrival of a request until its answer,
// stream, upgraded connection or tunnel has ended. Nothing ends an idle one. A
// request to one that sleeps waits for its resume, where its spec has one.
// Over HTTP/1.1 tunnels keep half-closes of both sides apart. Over HTTP/2 the
// guest's ends the tunnel: net/http can end a stream only as a whole.
//
// What fails is told in the caller's own protocol (Connect, gRPC, gRPC-Web, or
// JSON with an HTTP status), and by the header Hutch-Error, see Failure.
//
// Tested against real HTTP servers behind in-memory links, over HTTP/1.1 and
// HTTP/2: streams, WebSockets, half-closes, hostile addresses and answers.
package proxy
