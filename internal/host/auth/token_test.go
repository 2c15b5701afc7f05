package auth

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const (
	adminSecret = "admin-0123456789-0123456789"
	readSecret  = "read-0123456789-0123456789"
)

func testTokens(t *testing.T) []Token {
	t.Helper()
	admin, err := NewToken("alice", Admin, adminSecret)
	if err != nil {
		t.Fatal(err)
	}
	read, err := NewToken("prometheus", Read, readSecret)
	if err != nil {
		t.Fatal(err)
	}
	return []Token{admin, read}
}

func TestTokenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	secret := NewSecret()
	if err := WriteTokenFile(path, "alice", Admin, secret); err != nil {
		t.Fatal(err)
	}
	tokens, err := ReadTokenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, ok := match(tokens, secret)
	if !ok || got.name != "alice" || got.role != Admin {
		t.Errorf("written token reads back as %v, %v", got, ok)
	}
	if err := WriteTokenFile(path, "bob", Admin, NewSecret()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second write: %v, want it refused", err)
	}
	if again, err := ReadTokenFile(path); err != nil || len(again) != 1 || again[0] != tokens[0] {
		t.Errorf("the refused write changed the file: %v, %v", again, err)
	}
}

func TestTokenFileRefused(t *testing.T) {
	good := "hutch-tokens 1\nadmin alice " + adminSecret + "\n"
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		want    string
	}{
		"group may read":   {good, 0o640, "chmod 600"},
		"all may read":     {good, 0o604, "chmod 600"},
		"no header":        {"admin alice " + adminSecret + "\n", 0o600, "line 1"},
		"newer format":     {strings.Replace(good, " 1\n", " 2\n", 1), 0o600, "line 1"},
		"empty":            {"", 0o600, "line 1"},
		"no token":         {"hutch-tokens 1\n# nothing\n\n", 0o600, "holds no token"},
		"unknown role":     {"hutch-tokens 1\nroot alice " + adminSecret + "\n", 0o600, "line 2: the first word"},
		"short token":      {"hutch-tokens 1\nadmin alice short\n", 0o600, "line 2: token alice must be"},
		"missing word":     {"hutch-tokens 1\n\nadmin " + adminSecret + "\n", 0o600, "line 3: 2 words"},
		"same name twice":  {good + "read alice " + readSecret + "\n", 0o600, "line 3: the name or the token"},
		"same token twice": {good + "read bob " + adminSecret + "\n", 0o600, "line 3: the name or the token"},
		"bad name":         {"hutch-tokens 1\nadmin a/b " + adminSecret + "\n", 0o600, "token name must be"},
		"too large":        {good + strings.Repeat("#"+strings.Repeat("x", 1022)+"\n", 1100), 0o600, "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "tokens")
			if err := os.WriteFile(path, []byte(c.content), c.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			_, err := ReadTokenFile(path)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an error with %q", err, c.want)
			}
			if strings.Contains(err.Error(), adminSecret) || strings.Contains(err.Error(), readSecret) {
				t.Errorf("the error shows a token: %v", err)
			}
		})
	}
}

func TestTokenFileIsNoFifo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadTokenFile(path); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("got %v", err)
	}
}

func TestTokenNeverPrints(t *testing.T) {
	tok := testTokens(t)[0]
	for _, format := range []string{"%v", "%+v", "%s", "%q"} {
		if s := fmt.Sprintf(format, tok); strings.Contains(s, adminSecret) {
			t.Errorf("%s shows the secret", format)
		}
	}
}

func TestMatch(t *testing.T) {
	tokens := testTokens(t)
	for secret, want := range map[string]string{
		adminSecret: "alice", readSecret: "prometheus",
		"": "", adminSecret + "x": "", adminSecret[1:]: "", strings.ToUpper(adminSecret): "",
	} {
		got, ok := match(tokens, secret)
		if got.name != want || ok != (want != "") {
			t.Errorf("match(%q) = %q, %v", secret, got.name, ok)
		}
	}
	if _, ok := match(nil, ""); ok {
		t.Error("no tokens, and the empty one opens")
	}
}
