// Package testguest is what the conformance suite talks to inside a machine:
// a line protocol over the link, the same in a real guest and in a fake one.
//
// It owns the commands and their answers. It never does what a command asks
// for itself: the Machine does, because powering off is a system call in a
// real guest and a state in a fake one. Standard library only, so that the
// guest stays small. Tested by the suite that uses it.
//
// Every request and every answer is one line. An answer starts with the
// request's token, so that a caller skips what a connection before it left
// behind: "<token> <command> [argument]" is answered by "<token> <text>". A
// request that comes again is answered again, and not carried out again.
package testguest

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// maxLine bounds a request, in bytes.
const maxLine = 256 << 10

// Machine is what a guest can do.
type Machine interface {
	// Spam writes n bytes of text to the console.
	Spam(n int) error
	// Query answers a question about the guest: "cpus", "memory", "disks".
	Query(what string) (string, error)
	// Memory is what "fill", "check" and notes are about.
	Memory() Memory
	// End ends the guest: "poweroff", "panic" or "reboot". It does not return
	// in a real guest.
	End(how string) error
}

// Serve answers requests from rw until it fails or ends. The error is never
// nil, unless "later" said how to end the guest then.
func Serve(rw io.ReadWriter, m Machine) error {
	in := bufio.NewScanner(rw)
	in.Buffer(make([]byte, 4096), maxLine)
	last := "" // how to end the guest when the connection does
	var before, answer string
	for in.Scan() {
		token, rest, _ := strings.Cut(in.Text(), " ")
		command, argument, _ := strings.Cut(rest, " ")
		if command == "later" {
			last, command = argument, "echo"
		}
		if token != before {
			var err error
			if answer, err = run(m, command, argument); err != nil {
				answer = "error: " + err.Error()
			}
			before = token
		}
		if _, err := fmt.Fprintf(rw, "%s %s\n", token, answer); err != nil {
			return err
		}
	}
	if last != "" {
		return m.End(last)
	}
	if err := in.Err(); err != nil {
		return err
	}
	return io.EOF
}

func run(m Machine, command, argument string) (string, error) {
	switch command {
	case "echo":
		return argument, nil
	case "query":
		return m.Query(argument)
	case "spam":
		n, err := strconv.Atoi(argument)
		if err != nil {
			return "", err
		}
		return "spammed", m.Spam(n)
	case "fill":
		var mb, seed uint64
		if _, err := fmt.Sscan(argument, &mb, &seed); err != nil {
			return "", err
		}
		return "filled", fill(m.Memory(), mb, seed)
	case "check":
		return check(m.Memory())
	case "note":
		return "noted", note(m.Memory(), argument)
	case "noted":
		return noted(m.Memory())
	case "poweroff", "panic", "reboot":
		return "ending", m.End(command)
	}
	return "", fmt.Errorf("unknown command %q", command)
}
