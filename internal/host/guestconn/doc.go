// Package guestconn is the host's connection to one guest agent.
//
// It owns the reconnecting, the HTTP/2 transport over the link, and the typed
// calls to the agent's services. It never starts or stops a VM, never decides
// what a lost guest means, and never dials anything but the link that it was
// given. Everything that comes from a guest is taken for hostile: messages,
// headers, output, texts and waiting are bounded.
//
// An idle connection uses no processor time: there are no pings and no timers.
// A paused VM therefore looks like a slow one, and no call but the caller's own
// deadline gives up on it.
//
// Tested against an agent of test handlers behind internal/link's own guest
// side, over sockets that the tests cut.
package guestconn
