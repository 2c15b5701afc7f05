// Package jail starts a program with as little as it needs: a user id of its
// own, no capabilities and no way to get any, a given network namespace, its
// own IPC and UTS namespaces, a read-only view of the host's files, resource
// limits and a cgroup. One that serves a directory of the host sees that
// directory instead, and is root among its owner's files in a user namespace.
//
// It owns how a child is confined and the cgroups below its parent cgroup. It
// never knows what it starts, and never ends a process by itself except in
// Reclaim, which ends what is left in cgroups that nobody claims.
//
// Everything but the resource limits and the OOM score holds before the
// program's first instruction: it is set on a thread that is made for one
// fork, whose attributes the child inherits, and that ends after it.
//
// Cgroups are made at the top of the hierarchy, <Parent>/<name>, not below
// hutchd's own: they must outlive hutchd and be found by the next one. With
// cgroup v2 the child is born in its cgroup. With v1 the thread enters the
// cgroups before the fork. Which limits could not be set is told in a Report:
// hosts differ in what they allow even to root.
//
// Tested as root with programs that tell what they see of themselves.
package jail
