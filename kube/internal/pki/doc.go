// Package pki keeps the keys and certificates of one cluster in a directory.
//
// It owns DIR: two authorities (the cluster's, and one for the API server's front proxy), a leaf per user and server, and the key that signs
// service account tokens. What is there and good is kept; what is missing, damaged, signed by another authority, made for other names or in the
// last third of its life is made anew. Nothing depends on the host's name. It never deletes an authority: whoever wants new ones
// removes the directory while no server runs.
//
// A certificate file carries its authority behind it; a key file is 0600 and is written before its certificate, both by rename, so
// a reader that sees a new certificate finds its key. Programs read them again by themselves: see Keep.
//
// Tests need no cluster.
package pki
