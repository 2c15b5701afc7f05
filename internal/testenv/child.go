package testenv

import (
	"bufio"
	"os"
	"os/exec"
	"testing"
)

// KillAfter runs this test binary again with one more environment variable,
// "NAME=value", by which its TestMain knows what to do. It gives every line
// that the child writes to line, until the child has ended, and kills it after
// the first that line says enough to. A child that ends by itself fails the
// test.
func KillAfter(t testing.TB, variable string, line func(text string) (enough bool)) {
	t.Helper()
	cmd := exec.CommandContext(Context(t), os.Args[0])
	cmd.Env = append(os.Environ(), variable)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if enough := line(lines.Text()); !enough || killed {
			continue
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		killed = true
	}
	if err := cmd.Wait(); !killed {
		t.Fatalf("the child ended by itself: %v", err)
	}
}
