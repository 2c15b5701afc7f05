// Package rpcx is the Connect glue that both sides of hutch share.
//
// It owns the one table between fault classes and RPC codes, the form that
// errors have on the wire, and the interceptors and limits that every handler
// and every client uses. It is the only package that makes connect errors. It
// never knows a service. Request validation lives in the package validate
// below it, so that the guest agent does not link it. Tested by a walk over
// all classes and codes, and by calls over a real HTTP server in each of the
// three protocols.
package rpcx
