// Package arch holds the shape of the code in place, by tests only.
//
// It owns the table of who may import whom and the house rules that a compiler
// does not check. It is never imported.
package arch
