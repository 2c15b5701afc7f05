package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/testenv"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDockerContext(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.json")
	const others = "{\n\t\"auths\": {\n\t\t\"r.example\": {}\n\t},\n\t\"currentContext\": \"mine\",\n\t\"odd\": [\n\t\t1\n\t]\n}"
	if err := os.WriteFile(config, []byte(others), 0o640); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"unix:///run/a.sock", "unix:///run/b.sock"} {
		if err := writeContext(dir, "hutch-sb-1", host); err != nil {
			t.Fatal(err)
		}
		// The name is the SHA-256 of hutch-sb-1, as docker's client looks for it.
		got := read(t, filepath.Join(contextDir(dir, "meta", "hutch-sb-1"), "meta.json"))
		want := `{"Name":"hutch-sb-1","Metadata":{"Description":"Docker in the hutch sandbox sb-1"},"Endpoints":{"docker":{"Host":"` + host + `","SkipTLSVerify":false}}}`
		if got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
	if d := cmp.Diff(others, read(t, config)); d != "" {
		t.Errorf("the configuration changed:\n%s", d)
	}
	use := func(name string) {
		t.Helper()
		if err := setCurrentContext(dir, func(string) string { return name }); err != nil {
			t.Fatal(err)
		}
	}
	use("hutch-sb-1")
	if d := cmp.Diff(strings.Replace(others, "mine", "hutch-sb-1", 1), read(t, config)); d != "" {
		t.Error(d)
	}
	if st, _ := os.Stat(config); st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v", st.Mode())
	}
	var out, errs bytes.Buffer
	a := &App{Out: &out, Err: &errs}
	if err := a.removeContext(dir, "hutch-sb-1"); err != nil {
		t.Fatal(err)
	}
	if s := read(t, config); strings.Contains(s, "currentContext") || !strings.Contains(s, "odd") {
		t.Errorf("configuration: %s", s)
	}
	if !strings.Contains(errs.String(), "default") || out.String() != "hutch-sb-1\n" {
		t.Errorf("said %q %q", out.String(), errs.String())
	}
	if err := a.removeContext(dir, "hutch-sb-1"); err == nil || !strings.Contains(err.Error(), "hutch-sb-1") {
		t.Errorf("again: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "contexts", "meta")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestReplaceFileKeepsLinks(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(real, []byte("old"), 0o600), os.Symlink(real, link)); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(link, []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	st, err := os.Lstat(link)
	if err != nil || st.Mode().Type() != os.ModeSymlink || read(t, real) != "new" {
		t.Errorf("%v, %v, %q", st.Mode(), err, read(t, real))
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("left: %v", left)
	}
}

// TestExecDocker runs a docker client of the test's own.
func TestExecDocker(t *testing.T) {
	t.Setenv("DOCKER_CONTEXT", "elsewhere")
	t.Setenv("DOCKER_TLS_VERIFY", "1")
	script := filepath.Join(t.TempDir(), "docker")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho \"$DOCKER_HOST $DOCKER_CONTEXT$DOCKER_TLS_VERIFY $*\"; cat; exit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	a := &App{In: strings.NewReader("input"), Out: &out, Err: io.Discard}
	var status exitStatus
	if err := a.execDocker(script, []string{"run", "-i", "x y"}, "unix:///s"); !errors.As(err, &status) || status.code != 3 || status.msg != "" {
		t.Errorf("%v, want exit status 3", err)
	}
	if got := out.String(); got != "unix:///s  run -i x y\ninput" {
		t.Errorf("%q", got)
	}
	if err := os.WriteFile(script, []byte("#!/bin/sh\nkill -TERM $$\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := a.execDocker(script, nil, ""); !errors.As(err, &status) || status.code != 143 {
		t.Errorf("%v, want exit status 143", err)
	}
}

// TestTunnelDocker reaches a Docker behind a hutchd at TCP, through a socket
// that is gone afterwards.
func TestTunnelDocker(t *testing.T) {
	testenv.CheckGoroutines(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var asked sync.Map
	front := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Method+" "+r.Host+" "+r.Header.Get("Authorization"), true)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n\r\n")
		buf := make([]byte, 4096)
		_, _ = conn.Read(buf)
		fmt.Fprint(conn, "HTTP/1.1 503 Unavailable\r\nConnection: close\r\n\r\n{\"message\":\"sandbox sb-1 has no Docker\"}")
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = front.Serve(l) })
	defer func() { _ = front.Close(); serving.Wait() }()
	a := &App{In: strings.NewReader(""), Err: io.Discard, Getenv: func(k string) string {
		return map[string]string{"HUTCH_HOST": "tcp://" + l.Addr().String(), "HUTCH_TOKEN": "secret"}[k]
	}}
	cl, err := a.client()
	if err != nil {
		t.Fatal(err)
	}
	path, end, err := a.tunnelDocker(t.Context(), cl, "sb-1")
	if err != nil {
		t.Fatal(err)
	}
	var status exitStatus
	if err := a.awaitDocker(testenv.Context(t), path, "sb-1"); !errors.As(err, &status) || status.code != exitHutch || status.msg != "sandbox sb-1 has no Docker" {
		t.Errorf("%v", err)
	}
	if _, ok := asked.Load("CONNECT sb-1.docker:2375 Bearer secret"); !ok {
		t.Error("hutchd was asked for something else")
	}
	end()
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's directory is left: %v", err)
	}
}
