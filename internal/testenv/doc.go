// Package testenv is what tests of hutch need of the machine they run on.
//
// It owns the questions whether a test may run here (root, virtual machines),
// the check that a test left no goroutine behind, and the check that it left
// nothing on the host: processes, network namespaces, links, nftables tables,
// cgroups, mounts, loop devices, files; and what tests of several packages set
// up alike: a disk that is soon full, a cgroup, a child that is killed at work. It leaves
// nothing on the host, and only tests import it. A test that cannot run here is skipped, unless the
// environment variable REQUIRE (a comma list of "root" and "vm") names what it
// needs: then it fails, so that CI cannot skip by accident. Tested by its own
// unit tests, which leak on purpose and read the report.
package testenv
