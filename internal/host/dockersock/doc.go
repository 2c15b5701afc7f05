// Package dockersock gives every sandbox a Docker socket on the host,
// <run>/sandboxes/<id>/docker.sock, at which a stock docker client works as if
// the daemon were here.
//
// It owns the sockets, the connections to them and what is known of each
// guest's Docker. It never runs a daemon or a client, never keeps a connection
// to a guest that serves no request, and decides about no port of the host
// (Ports does).
//
// A socket is there from when its sandbox first runs until the sandbox goes. It
// follows the sandboxes by their events: what is done about one depends on its
// state and not on the event, so that nothing hangs on the order. A sandbox
// that can't be used answers at its socket in words, as an error of Docker's
// API, which clients show.
//
// A request holds the sandbox active until its answer or its hijacked
// connection has ended; a client that keeps its connection open for a next
// request does not. Each request has a connection of its own to the guest's
// daemon, and costs no call of the guest: only when it can't be known that the
// daemon runs, at first, and after a connection was refused, the guest is asked
// to start it, once for all who wait.
//
// HTTP is spoken as far as needed. Connections that turn into something else
// (attach, exec, the sessions of builds) are carried as bytes with half-closes
// kept apart both ways: the end of a client's input is not the end of its
// connection. Of all requests only those that make or start a container are
// looked at. The ports of the host that it is to publish are reserved before the
// daemon hears of the start, so that a port that is taken is an error of that
// start and not a port that leads nowhere. What a new container leaves open (-P,
// -p 80, a range) is chosen here: the daemon knows what is free in its guest.
//
// Tested over real sockets in front of an agent of test handlers and a daemon of
// test handlers: half-closes, hijacked bulk by digest, many clients, restarts,
// sleep and destruction while connected. With a real client and daemon in
// test/e2e.
package dockersock
