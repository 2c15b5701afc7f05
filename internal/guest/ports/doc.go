// Package ports knows which ports of this machine containers and Kubernetes
// Services have published, and tells whoever watches.
//
// It owns the board: the full set of each owner, numbered by one sequence, and
// the watchers, each of which is told all that is there, then that this was all,
// then what changes. A slow watcher holds nobody up and costs no more than what
// there is to tell: of one owner it gets the latest only. What is on the board
// comes from sources, which run from Start to Stop: Docker follows a docker
// daemon over its restarts, Kubernetes the Services of a cluster over its lives.
// Until a source is started there is nothing here but an empty map.
//
// It never opens a port, never judges one, and starts no daemon. It speaks
// HTTP and JSON with types of its own, as the daemons' libraries are larger than
// the agent.
//
// Tested against a docker daemon and an API server of its own, which break off
// in the middle of events and come back.
package ports
