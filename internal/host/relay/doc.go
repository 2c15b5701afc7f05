// Package relay is what every way from outside into guests does with bytes:
// bodies that end when either side wants no more, connections that are taken
// over, copying both ways with half-closes kept apart.
//
// It owns no connection for longer than a call, and never looks at what it
// carries. It knows neither sandboxes nor guests nor who may call. It is
// tested by package proxy and package dockersock, whose protocols need it, and
// for half-closes here.
package relay
