package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	hostagentv1 "github.com/hutch-run/hutch/gen/hostagent/v1"
)

func noEnv(string) string { return "" }

func TestParseHost(t *testing.T) {
	for in, want := range map[string]target{
		"unix:///run/hutch/hutchd.sock": {"unix", "/run/hutch/hutchd.sock", "http://localhost", false},
		"tcp://127.0.0.1:7070":          {"tcp", "127.0.0.1:7070", "http://127.0.0.1:7070", false},
		"tcp://[::1]:7070":              {"tcp", "[::1]:7070", "http://[::1]:7070", false},
		"https://box.example":           {"tcp", "box.example:443", "https://box.example", true},
		"https://box.example:8443/":     {"tcp", "box.example:8443", "https://box.example:8443", true},
	} {
		got, err := parseHost(in)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", in, got, err, want)
		}
	}
	for _, bad := range []string{"", "localhost", "/run/x.sock", "unix://run/x.sock", "tcp://host", "tcp://h:1/x", "http://h:1", "https:///x", "ftp://h:1"} {
		if _, err := parseHost(bad); err == nil || !strings.Contains(err.Error(), "unix:///path") {
			t.Errorf("%q: error %v does not say what is wanted", bad, err)
		}
	}
}

func TestMegabytes(t *testing.T) {
	for in, want := range map[string]int32{"": 0, "512": 512, "512m": 512, "512MiB": 512, "2g": 2048, "2GB": 2048, "1t": 1 << 20} {
		if got, err := megabytes("--memory", in); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, bad := range []string{"x", "-1", "0", "1.5g", "99999999t", "g", "5k"} {
		if _, err := megabytes("--memory", bad); err == nil || !strings.Contains(err.Error(), "--memory") {
			t.Errorf("%q: error %v does not name the flag", bad, err)
		}
	}
}

func TestPairs(t *testing.T) {
	getenv := func(k string) string { return map[string]string{"HOME": "/root"}[k] }
	got, err := pairs("--env", []string{"A=1", "B=", "HOME", "UNSET", "C=x=y"}, getenv)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]string{"A": "1", "B": "", "HOME": "/root", "C": "x=y"}, got); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"", "=x"} {
		if _, err := pairs("--env", []string{bad}, getenv); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
	if _, err := pairs("--label", []string{"KEY"}, nil); err == nil {
		t.Error("label without value accepted")
	}
}

func TestCreateRequest(t *testing.T) {
	f := createFlags{vcpus: 2, memory: "1g", idle: 1500 * time.Millisecond, network: "none"}
	req, err := f.request("debian", noEnv)
	if err != nil {
		t.Fatal(err)
	}
	if req.GetMemoryMb() != 1024 || req.GetTimeoutSec() != 2 || req.GetNetwork().GetMode() != hostagentv1.NetworkPolicy_MODE_NONE {
		t.Errorf("request %v", req)
	}
	f.network = "some"
	if _, err := f.request("debian", noEnv); err == nil || !strings.Contains(err.Error(), "internet, none or allow") {
		t.Errorf("bad mode: %v", err)
	}
}

func TestShareFlag(t *testing.T) {
	f := createFlags{network: "internet", shares: []string{"/srv/a:/mnt/a", "/srv/b:/mnt/b:ro", "/srv/c:/mnt/c:rw"}}
	req, err := f.request("", noEnv)
	if err != nil {
		t.Fatal(err)
	}
	want := &hostagentv1.CreateSandboxRequest{Shares: []*hostagentv1.HostShare{
		{HostPath: "/srv/a", GuestPath: "/mnt/a"}, {HostPath: "/srv/b", GuestPath: "/mnt/b", ReadOnly: true}, {HostPath: "/srv/c", GuestPath: "/mnt/c"},
	}}
	if diff := cmp.Diff(want.GetShares(), req.GetShares(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{"", "/a", "a:/b", "/a:b", "/a:/b:x", ":ro", "/a:ro"} {
		f.shares = []string{bad}
		if _, err := f.request("", noEnv); err == nil || !strings.HasPrefix(err.Error(), "--share ") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestOnTimeoutFlag(t *testing.T) {
	for then, want := range map[string]hostagentv1.OnTimeout{
		"": hostagentv1.OnTimeout_ON_TIMEOUT_UNSPECIFIED, "destroy": hostagentv1.OnTimeout_ON_TIMEOUT_DESTROY,
		"pause": hostagentv1.OnTimeout_ON_TIMEOUT_PAUSE, "hibernate": hostagentv1.OnTimeout_ON_TIMEOUT_HIBERNATE,
	} {
		f := createFlags{idle: time.Minute, network: "internet", then: then, auto: then != ""}
		req, err := f.request("", noEnv)
		if err != nil || req.GetOnTimeout() != want || req.GetAutoResume() != f.auto {
			t.Errorf("%q: %v, %v", then, req, err)
		}
	}
	for _, f := range []createFlags{{then: "pause"}, {then: "sleep", idle: time.Minute}} {
		f.network = "internet"
		if _, err := f.request("", noEnv); err == nil || !strings.HasPrefix(err.Error(), "--on-timeout ") {
			t.Errorf("%s after %s: %v", f.then, f.idle, err)
		}
	}
}

func TestParsePlace(t *testing.T) {
	for in, want := range map[string]place{
		"sb-12:/srv": {"sb-12", "/srv"}, "sb-12:": {"sb-12", ""}, "./a:b": {"", "./a:b"},
		"/a:b": {"", "/a:b"}, "file": {"", "file"}, "-": {"", "-"}, "sb:rel/x:y": {"sb", "rel/x:y"},
	} {
		if got := parsePlace(in); got != want {
			t.Errorf("%q: %+v, want %+v", in, got, want)
		}
	}
}

func TestParsePorts(t *testing.T) {
	for in, want := range map[string]struct {
		local string
		port  uint16
	}{"80": {"80", 80}, "9000:80": {"9000", 80}, "0:80": {"0", 80}} {
		local, port, err := parsePorts(in)
		if err != nil || local != want.local || port != want.port {
			t.Errorf("%q: %s %d %v", in, local, port, err)
		}
	}
	for _, bad := range []string{"", "0", "70000", "a:80", "80:", "-1:80"} {
		if _, _, err := parsePorts(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestTreesTravel(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "new")
	for name, content := range map[string]string{"a": "one", "d/b": "two", "d/e/c": "three"} {
		path := filepath.Join(from, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Join(from, "a"), 0o755)
	os.Symlink("d/b", filepath.Join(from, "link"))
	var b bytes.Buffer
	if err := packTree(&b, from); err != nil {
		t.Fatal(err)
	}
	if err := unpackTree(&b, to); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(to, "link")); err != nil || string(got) != "two" {
		t.Errorf("through the link: %q, %v", got, err)
	}
	if fi, err := os.Stat(filepath.Join(to, "a")); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("mode: %v, %v", fi, err)
	}
}

// TestHostileArchiveStaysInside unpacks what a hostile guest could send.
func TestHostileArchiveStaysInside(t *testing.T) {
	outside := t.TempDir()
	for name, entries := range map[string][]tar.Header{
		"dot dot":      {{Name: "../x", Typeflag: tar.TypeReg}},
		"through link": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "l/x", Typeflag: tar.TypeReg}},
		"hard link":    {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../../../../etc/passwd"}},
		"link up":      {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "l/x", Typeflag: tar.TypeReg}},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			tw := tar.NewWriter(&b)
			for _, h := range entries {
				h.Mode = 0o644
				if err := tw.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
			}
			tw.Close()
			dir := filepath.Join(t.TempDir(), "in")
			if err := unpackTree(&b, dir); err == nil {
				t.Error("unpacked without an error")
			}
			for _, p := range []string{filepath.Join(outside, "x"), filepath.Join(dir, "../x")} {
				if _, err := os.Lstat(p); err == nil {
					t.Errorf("%s was written", p)
				}
			}
		})
	}
}

func TestBarAndSizes(t *testing.T) {
	if got := bar("pull", 512, 1024); !strings.Contains(got, "[============            ] 512 B / 1.0 KiB") {
		t.Errorf("bar %q", got)
	}
	if got := size(5 << 30); got != "5.0 GiB" {
		t.Errorf("size %q", got)
	}
	if got := ago(time.Unix(0, 0), time.Unix(7200, 0)); got != "2h" {
		t.Errorf("ago %q", got)
	}
}

func TestProgressOffTerminalIsALineAStep(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	for i := range int64(10) {
		p.update("one", i, 10)
	}
	p.update("two", 0, 0)
	p.end()
	if b.String() != "one\ntwo\n" {
		t.Errorf("printed %q", b.String())
	}
}

func TestUnreachableDaemonSaysWhatToDo(t *testing.T) {
	for _, host := range []string{"unix:///no/such/socket", "tcp://127.0.0.1:1"} {
		var out, errOut bytes.Buffer
		a := &App{In: strings.NewReader(""), Out: &out, Err: &errOut, Getenv: func(k string) string {
			if k == "HUTCH_HOST" {
				return host
			}
			return ""
		}}
		code := a.Run(context.Background(), []string{"ls"})
		if code != exitHutch || !strings.Contains(errOut.String(), "hutchd setup") || !strings.Contains(errOut.String(), host) {
			t.Errorf("%s: exit %d, said %q", host, code, errOut.String())
		}
	}
}

// TestEveryCommandHasHelp walks the tree: no command without a short text, and
// every flag with one.
func TestEveryCommandHasHelp(t *testing.T) {
	a := &App{In: strings.NewReader(""), Out: &bytes.Buffer{}, Err: &bytes.Buffer{}, Getenv: noEnv}
	root := a.root()
	var names []string
	for _, c := range root.Commands() {
		names = append(names, c.Name())
		if c.Short == "" {
			t.Errorf("%s has no help", c.CommandPath())
		}
	}
	want := []string{
		"cp", "create", "debug", "docker", "doctor", "events", "exec", "fork", "hibernate", "inspect", "kube", "kubeconfig", "kubectl", "logs", "ls", "pause", "port", "resume", "rm",
		"run", "setup", "shell", "snapshot", "stats", "template", "trim", "version", "wait",
	}
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
}

func TestProgramDropsOneDashDash(t *testing.T) {
	for _, c := range []struct{ in, want string }{{"-- ls -l", "ls -l"}, {"ls -- -l", "ls -- -l"}, {"-- -- x", "-- x"}, {"", ""}} {
		if got := strings.Join(program(strings.Fields(c.in)), " "); got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
	}
}
