// Package kubeconfig changes kubectl's files of credentials.
//
// It owns the entries of one name (a cluster, a user and a context), and puts
// them into a file or takes them out of it. It never touches what has another
// name: comments, order and fields that it does not know stay, for the text is
// edited in place, and what comes out of it must be, to kubectl's own reader,
// exactly what was meant; else kubectl's own writer writes it. A file changes
// as a whole or not at all, keeps its mode and owner, and stays where symlinks
// lead; two changes at a time wait for one another. A file that can't be read
// or understood is left as it is.
//
// Tested on real files.
package kubeconfig
