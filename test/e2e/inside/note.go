package main

import (
	"os"
	"strings"
)

// note adds a line to a file, and returns what is in it then.
func note(file, line string) (string, error) {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return "", err
	}
	if _, err := f.WriteString(line + "\n"); err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	b, err := os.ReadFile(file)
	return strings.TrimSuffix(string(b), "\n"), err
}
