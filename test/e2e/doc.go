// Package e2e runs the real programs against real sandboxes: what a user would
// do, and what goes wrong when machines, daemons and clients die. Every test
// ends with the leak check of the harness.
package e2e
