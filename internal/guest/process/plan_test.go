package process

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hutch-run/hutch/internal/fault"
	"github.com/hutch-run/hutch/internal/guest/account"
	"github.com/hutch-run/hutch/internal/testenv"
)

func TestEnvironmentAndUser(t *testing.T) {
	tab := newTable(t, nil)
	s := Spec{Cmd: "env", User: "nobody", Env: map[string]string{"MINE": "1", "HOME": "/x", "EMPTY": ""}}
	_, sub := start(t, tab, s)
	got := map[string]string{}
	for line := range strings.Lines(collect(t, sub).stdout()) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		got[k] = v
	}
	want := map[string]string{
		"SANDBOX": "yes", "MINE": "1", "HOME": "/x", "EMPTY": "", "USER": "nobody", "LOGNAME": "nobody",
		"SHELL": "/usr/sbin/nologin", "PATH": defaultPath,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestSupplementaryGroupsAndCapabilities(t *testing.T) {
	root := t.TempDir()
	noErr(t, os.MkdirAll(root+"/etc", 0o755))
	noErr(t, os.WriteFile(root+"/etc/passwd", []byte("root:x:0:0::/root:/bin/sh\napp:x:4001:4002::/nowhere:/bin/sh\n"), 0o644))
	noErr(t, os.WriteFile(root+"/etc/group", []byte("app:x:4002:\nextra:x:4003:other,app\nmore:x:4004:app\nnot:x:4005:apple\n"), 0o644))
	tab := newTable(t, func(p *Params) { p.Accounts = account.NewFiles(root) })
	for user, want := range map[string]string{
		"app":        "4001 4002 4002 4003 4004 /",
		"4001":       "4001 4002 4002 4003 4004 /",
		"app:extra":  "4001 4003 4003 /",
		"5000:6000":  "5000 6000 6000 /",
		"5000":       "5000 0 0 /",
		"root:extra": "0 4003 4003 ",
	} {
		s := shell("echo $(id -u) $(id -g) $(id -G) $(pwd); grep CapEff /proc/self/status; ls -l /proc/self/fd | wc -l")
		s.User = user
		_, sub := start(t, tab, s)
		lines := strings.Split(collect(t, sub).stdout(), "\n")
		if !strings.HasPrefix(lines[0], want) {
			t.Errorf("user %s: %q, want %q", user, lines[0], want)
		}
		if zero := strings.HasSuffix(lines[1], "0000000000000000"); zero == strings.HasPrefix(user, "root") {
			t.Errorf("user %s: %s", user, lines[1])
		}
		if lines[2] != "5" { // a head line, 0, 1, 2, and the one that ls has open itself
			t.Errorf("user %s: %s lines of descriptors: something of the agent leaked", user, lines[2])
		}
	}
}

func TestBadStarts(t *testing.T) {
	dir := t.TempDir()
	noErr(t, os.Chmod(dir, 0o755))
	noErr(t, os.WriteFile(dir+"/plain", []byte("x"), 0o644))
	noErr(t, os.WriteFile(dir+"/junk", []byte{0, 1, 2, 3}, 0o755))
	noErr(t, os.WriteFile(dir+"/script", []byte("#!/no/such/interpreter\n"), 0o755))
	noErr(t, os.Mkdir(dir+"/secret", 0o700))
	noErr(t, os.WriteFile(dir+"/secret/prog", []byte("#!/bin/sh\n"), 0o755))
	tab := newTable(t, nil)
	str := func(s string) *string { return &s }
	for name, tc := range map[string]struct {
		spec  Spec
		class fault.Class
		words string
	}{
		"no cmd":            {Spec{}, fault.Invalid, "process.cmd"},
		"unknown in PATH":   {Spec{Cmd: "no-such-program"}, fault.NotFound, `"no-such-program" not found in PATH`},
		"PATH of the call":  {Spec{Cmd: "true", Env: map[string]string{"PATH": dir}}, fault.NotFound, dir},
		"unknown path":      {Spec{Cmd: "/no/such"}, fault.NotFound, "does not exist"},
		"no interpreter":    {Spec{Cmd: dir + "/script"}, fault.NotFound, "interpreter"},
		"not executable":    {Spec{Cmd: dir + "/plain"}, fault.Denied, "may not be executed"},
		"a directory":       {Spec{Cmd: dir}, fault.Denied, "is a directory"},
		"not a program":     {Spec{Cmd: dir + "/junk"}, fault.Invalid, "not a program"},
		"out of reach":      {Spec{Cmd: dir + "/secret/prog", User: "nobody"}, fault.Denied, "may not be executed"},
		"no cwd":            {Spec{Cmd: "true", Cwd: str("/no/such")}, fault.Invalid, "process.cwd"},
		"cwd is a file":     {Spec{Cmd: "true", Cwd: str(dir + "/plain")}, fault.Invalid, "not a directory"},
		"cwd out of reach":  {Spec{Cmd: "true", Cwd: str(dir + "/secret"), User: "nobody"}, fault.Invalid, "may not enter"},
		"unknown user":      {Spec{Cmd: "true", User: "nobody-at-all"}, fault.Invalid, "unknown user"},
		"unknown caller":    {Spec{Cmd: "true", HeaderUser: "nobody-at-all"}, fault.Unauthenticated, "unknown user"},
		"NUL in an arg":     {Spec{Cmd: "true", Args: []string{"a\x00b"}}, fault.Invalid, "process.args[0]"},
		"= in a name":       {Spec{Cmd: "true", Env: map[string]string{"a=b": ""}}, fault.Invalid, "process.envs"},
		"too large for all": {Spec{Cmd: "true", Args: []string{strings.Repeat("x", 3<<20)}}, fault.Invalid, "larger than the kernel takes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := tab.Start(testenv.Context(t), tc.spec)
			if !fault.Is(err, tc.class) || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("got %v (%v), want %v with %q", err, fault.Of(err), tc.class, tc.words)
			}
		})
	}
	if n := len(tab.groups.all()); n != 0 {
		t.Errorf("%d cgroups left by starts that failed", n)
	}
	if tab.places != 0 || len(tab.List()) != 0 {
		t.Error("programs that never ran are counted")
	}
}
