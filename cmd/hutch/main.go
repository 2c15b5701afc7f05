// Hutch is the command line of hutch.
package main

import (
	"os"

	"github.com/hutch-run/hutch/internal/cli"
)

func main() { os.Exit(cli.Main()) }
