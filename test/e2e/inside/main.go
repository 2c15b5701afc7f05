// Command inside is what tests run inside of a sandbox: a server to connect
// to, and a client of the world outside that says how an attempt went.
//
//	inside serve               serve until killed
//	inside linger              serve until asked to end, and take a second for it
//	inside lookup NAME         print the addresses of NAME
//	inside ask NETWORK ADDRESS print what answers there, to "tcp" or "udp"
//	inside hold MB SEED        keep memory full of a pattern until killed
//	inside tell check|turn     have that checked, or changed in part
//	inside note FILE LINE      add a line to a file and print all of it
//	inside answer              answer questions on standard input, see copy.go
//	inside site PORT TEXT      serve TEXT over HTTP until killed
//	inside digest              print the SHA-256 of standard input
//	inside cat [FILE]          print standard input, or a file
//	inside count               print a line a second until killed
//
// It exits with 1 when it was refused or answered with an error, and with 2
// when nothing came back at all. It is built and copied in by ./test/e2e.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"
)

// patience is how long an answer may take. It is long: what has to fail fails
// by a refusal, not by silence.
const patience = 20 * time.Second

func main() {
	said, err := run(os.Args[1:])
	if err == nil {
		if said != "" {
			fmt.Fprintln(os.Stdout, said)
		}
		return
	}
	fmt.Fprintln(os.Stderr, err)
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		os.Exit(2)
	}
	os.Exit(1)
}

func run(args []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	switch {
	case len(args) == 1 && args[0] == "serve":
		return "", serve()
	case len(args) == 1 && args[0] == "linger":
		return "", linger()
	case len(args) == 3 && args[0] == "site":
		return "", site(args[1], args[2])
	case len(args) == 1 && args[0] == "digest":
		return digest(os.Stdin)
	case len(args) > 0 && args[0] == "cat":
		return "", cat(args[1:])
	case len(args) == 1 && args[0] == "count":
		return "", count()
	case len(args) == 3 && args[0] == "hold":
		return "", hold(args[1], args[2])
	case len(args) == 3 && args[0] == "note":
		return note(args[1], args[2])
	case len(args) == 1 && args[0] == "answer":
		return "", answerLines(os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == "tell":
		return tell(ctx, args[1])
	case len(args) == 2 && args[0] == "lookup":
		found, err := net.DefaultResolver.LookupHost(ctx, args[1])
		slices.Sort(found)
		return strings.Join(found, " "), err
	case len(args) == 3 && args[0] == "ask":
		return ask(ctx, args[1], args[2])
	}
	return "", fmt.Errorf("arguments %q are not understood", args)
}

func ask(ctx context.Context, network, address string) (string, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if network == "udp" {
		return askAgain(c)
	}
	if _, err := io.WriteString(c, "?"); err != nil {
		return "", err
	}
	said, err := io.ReadAll(c)
	return string(said), err
}

// askAgain asks every second until something comes back: kernels answer only
// so many datagrams with a refusal.
func askAgain(c net.Conn) (said string, err error) {
	buf := make([]byte, 2048)
	for began := time.Now(); time.Since(began) < patience; {
		if err = c.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return "", err
		}
		if _, err = io.WriteString(c, "?"); err != nil {
			return "", err
		}
		var n int
		if n, err = c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			return string(buf[:n]), err
		}
	}
	return "", err
}
