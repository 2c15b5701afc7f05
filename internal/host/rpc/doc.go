// Package rpc is the API of hutchd as callers see it.
//
// It owns the handlers of hostagent.v1 (each converts, calls, converts), what
// surrounds them on one port (health, reflection, metrics, the way to the
// proxy), and the server and listeners with their limits. It never decides
// anything about sandboxes or templates: those stand behind the interfaces in
// deps.go. Generated types do not leave this package.
//
// Every RPC is served as Connect (plain JSON by curl included), gRPC and
// gRPC-Web, over HTTP/1.1 and HTTP/2, with or without TLS:
//
//	curl -H 'Content-Type: application/json' -d '{}' http://127.0.0.1:7777/hostagent.v1.HostAgentService/ListSandboxes
//
// Limits: heads of 64 KiB, messages of 16 MiB in and 24 MiB out (an exec may
// answer 8 MiB on each stream, in base64), 1000 streams a connection, 10 s for
// the head of a request, 5 min for an idle connection. Streams have no limit
// in time.
//
// A TCP listener beyond loopback needs TLS and a token, see Listen. On loopback
// without tokens everybody on the host may do everything, but no web page may:
// package auth tells how.
//
// Tested by raw JSON over HTTP/1.1 and by generated clients of all protocols,
// against fakes behind the interfaces and the real event log.
package rpc
