// Package sysinfo describes the machine as the guest sees it.
//
// It owns the reading of /etc/os-release, of /proc and /sys, of uname and of
// the interfaces' addresses. It never runs a program, and never trusts what it
// reads: files belong to the image or to the user, so every read is bounded,
// never blocks, and never leaves the root. What is missing is empty or zero in
// the answer. Tested against made-up trees, hostile ones among them, and
// against the machine of the test.
package sysinfo
