// Package auth says who asks and what they may do.
//
// It owns the tokens and their file, the way from a request to a Principal,
// the one table from every RPC and route to the role it needs, and the rules
// that keep web pages from driving a hutchd without tokens. It never decides
// what a request does, never keeps a token in clear after it was read, and
// never writes one to a log or an error.
//
// Who a caller is depends on where the request came in:
//
//	unix socket            who may open it may do everything: its file mode is the rule
//	TCP, no tokens set up  everything, but on loopback addresses only, and not for web pages
//	TCP, tokens set up     what the token's role allows; no token, nothing but health
//
// A token comes as "Hutch-Token: T" or as "Authorization: Bearer T"; the first
// leaves Authorization free for the guest behind the proxy. CONNECT may also
// carry it as a proxy password, "Proxy-Authorization", Bearer or Basic.
// Whatever carried a token of ours is taken off the request here, so that no
// handler, log or guest behind it can see one.
//
// Tested in both directions against the descriptors of all services: every RPC
// has a rule, every rule has an RPC; and by requests of every kind of caller.
package auth
