// Hutch-agent is the one program of hutch inside a sandbox: PID 1, and as its
// child the server of the guest APIs.
package main

import (
	"fmt"
	"os"

	"github.com/hutch-run/hutch/internal/guest/agent"
	"github.com/hutch-run/hutch/internal/guest/boot"
	"github.com/hutch-run/hutch/internal/version"
)

func main() {
	switch {
	case os.Getpid() == 1:
		boot.Main()
	case len(os.Args) == 2 && os.Args[1] == "serve":
		if err := agent.Serve(); err != nil {
			fmt.Fprintln(os.Stderr, "hutch-agent:", err)
			os.Exit(1)
		}
	case len(os.Args) == 2 && os.Args[1] == "version":
		fmt.Println(version.Version)
	default:
		fmt.Fprintln(os.Stderr, "hutch-agent runs inside a sandbox, as PID 1")
		os.Exit(2)
	}
}
