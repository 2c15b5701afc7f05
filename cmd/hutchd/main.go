// Hutchd is the host agent of hutch.
package main

import (
	"os"

	"github.com/hutch-run/hutch/internal/host/daemon"
)

func main() { os.Exit(daemon.Main()) }
