// Package filesrpc serves the files of a guest: filesystem.Filesystem and the
// plain HTTP endpoint /files, both wire-compatible with E2B's guest protocol,
// and /files/archive for whole trees.
//
// It owns the conversion between messages and domain types and the shape of
// requests and answers on HTTP. It decides nothing about files: the package
// files does. Tested through generated clients and plain HTTP over a real
// server.
//
// HTTP. The user of a call is the query's username, else that of a Basic
// authorization, else the sandbox's default. Errors are {"code": status,
// "message": words} with the status of rpcx.HTTPStatus, and 507 for a full
// disk.
//
//	GET, HEAD /files?path=            the content; ranges and conditions work
//	POST, PUT /files?path=            a raw body, or multipart with parts named
//	                                  "file", each named by path or else by its
//	                                  file name; X-Metadata-* headers are
//	                                  kept; Content-Encoding may be gzip
//	GET       /files/archive?path=    a tar stream of a file or directory
//	PUT, POST /files/archive?path=    lays a tar stream out below a directory;
//	                                  preserve=true keeps owners (root only)
package filesrpc
