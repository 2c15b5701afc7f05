// Package recipe makes root filesystems from Debian packages: the images that
// hutch offers without a registry.
//
// A recipe fetches packages with the host's own apt, from the sources and
// through the proxies that the host is configured for, and hands over a root
// tar for package image. minimal is put together here, package by package and
// without running anything of theirs; debian and python311 are made by
// mmdebstrap, whose output is cleaned of what differs from run to run and of
// what no sandbox needs. The same packages give the same files.
//
// It owns nothing on the host beyond a work directory that it is given, except
// that it installs mmdebstrap when that is missing, and that apt keeps its
// package lists. It never changes the host's apt configuration, and nothing of
// that configuration gets into an image but the addresses of Debian's archive.
//
// Tested by reading made-up packages, and by building the recipes for real
// where root and an archive are there.
package recipe
