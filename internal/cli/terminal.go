package cli

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	processpb "github.com/hutch-run/hutch/gen/process"
)

// watchTerminal calls resized with the size of terminal w whenever it changes,
// until ctx ends or the returned function is called, which waits for the last
// call.
func watchTerminal(ctx context.Context, w io.Writer, resized func(*processpb.PTY_Size)) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGWINCH)
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(done)
		for {
			select {
			case <-c:
				resized(terminalSize(w))
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		signal.Stop(c)
		cancel()
		<-done
	}
}
