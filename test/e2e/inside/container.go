package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

// What a container of a test runs.

// site serves what greeting says on a port, over HTTP, and the same over UDP.
func site(port, greeting string) error {
	p, err := net.ListenPacket("udp", ":"+port)
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- echoDatagrams(p) }()
	go func() {
		failed <- http.ListenAndServe(":"+port, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, greeting)
		}))
	}()
	fmt.Fprintln(os.Stdout, "serving")
	return <-failed
}

// digest returns the SHA-256 of what there is to read.
func digest(r io.Reader) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// count prints a line a second until it is killed.
func count() error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 1; ; n++ {
		if _, err := fmt.Fprintln(os.Stdout, "line", n); err != nil {
			return err
		}
		<-tick.C
	}
}

// cat prints standard input, or the file that is named.
func cat(files []string) error {
	var in io.Reader = os.Stdin
	if len(files) > 0 {
		f, err := os.Open(files[0])
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	_, err := io.Copy(os.Stdout, in)
	return err
}
