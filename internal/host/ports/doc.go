// Package ports opens on the host what containers and Kubernetes Services in
// sandboxes publish.
//
// It owns the table of what each owner in each sandbox asks for, the listeners
// on the host, each held by one owner, the connections and flows that go through
// them, and the file in a sandbox's directory that brings both back after a
// restart. It learns what is published from the guests alone, one stream per
// running sandbox, which is no use of the sandbox; a connection is.
//
//	guest's event ─► owner's full set ─► policy: which addresses ─► listeners
//	connection ─► Use (holds the sandbox, resumes it where its spec says so) ─► port of the guest
//
// Whose a listener is decides who closes it: of two containers that swap a port
// neither can close the other's. A port that is taken is told by List, and tried
// again when a listener of ours is closed, when anything changes, and every 15 s
// while there is such a port. Reserve takes ports ahead, for a container that is
// about to start, and Choose picks numbers for one that is about to be made.
//
// A sandbox that is paused or hibernated keeps its listeners, over restarts of
// hutchd too: a connection resumes one with auto_resume, and is reset otherwise.
// One that is stopped, or in error, has nothing published; one that is destroyed
// loses its listeners, connections and flows at once. Connections outlive the
// removal of a binding, as they do with docker: their container ends them. An
// owner that asks for any free port gets the same number again for as long as
// the sandbox lives, unless somebody else took it meanwhile.
//
// What a guest says is hostile: addresses are parsed and never resolved, names
// and lists are cut, what it can make the host open is bounded in number and in
// rate, and by default it is on loopback only. See Policy.
//
// It never judges what docker may do inside a sandbox: a port that another
// owner of the same sandbox holds is no conflict of the host's.
//
// Tested on real sockets of the loopback, against guests that the tests make up.
package ports
