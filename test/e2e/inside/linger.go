package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// lingering is what linger needs to end.
const lingering = time.Second

// linger serves like serve. Asked to end, it does so after a while, and says
// so.
func linger() error {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM)
	failed := make(chan error, 1)
	go func() { failed <- serve() }()
	select {
	case err := <-failed:
		return err
	case <-asked:
	}
	<-time.After(lingering)
	_, err := fmt.Fprintln(os.Stdout, "ended in order")
	return err
}
