// Package spec runs the whole given host interface against a real hutchd, as
// clients that know nothing of hutch but the two given files: proto/ holds
// them bare, gen/ what is generated from them.
//
// It must not link hutch's own generated code, which has the same names.
package spec
