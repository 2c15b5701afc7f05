// Package dns is the cluster's DNS: CoreDNS's kubernetes, cache and forward plugins, put together here instead of by a Corefile, in the server's own process.
//
// It owns one address of the node, over UDP and TCP, and one user of the API. Names of the cluster come from the API, everything else from
// the node's resolv.conf, which is read again when it changes: a copied machine may have another. It never asks itself.
// CoreDNS's own start is not used because it takes over the log of the whole process, and its loop plugin because it ends the process. Tests ask a server with
// a fake upstream; names of the cluster are asked in the test of the whole server.
package dns
