// Package rpc is the door of the guest agent: the handler of its own service,
// the call by which it is configured, and the HTTP server's root with
// everything mounted.
//
// It owns the conversion between messages and the types of the packages that
// do the work, and decides nothing. It never authenticates: whoever reaches
// the server is the host. The server must listen on the link alone, where only
// hutchd dials; to serve this handler on a network would hand the machine to
// anybody. Configure is no part of that server, so no caller of it gets there. Requests are
// not checked against proto rules here, since the rule engine is larger than
// the agent; the packages behind check what they are given. Tested over HTTP
// with made-up parts.
package rpc
